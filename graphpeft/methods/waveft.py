"""WaveFT: a change of a weight that is made of a few wavelets, whose coefficients are trained.

    ΔW = s · Lᵣ D Lᵢᵀ        D: zeros, but for the spectrum at places that are drawn once, from a seed
                             Lᵣ (out, …), Lᵢ (in, …): one step of wavelet synthesis, of rows and of columns
                             without `use_idwt`, ΔW = s · D

Source: Bilican et al., "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", arXiv 2505.12532; the
same numbers as PEFT's ``tuners/waveft/layer.py``.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.fourierft import places_drawn, too_many
from graphpeft.methods.matrices import Matrices, matrices_of
from graphpeft.methods.wavelets import band, filters_of, synthesised
from graphpeft.rules.delta_rule import DeltaRule
from graphpeft.rules.options import InitWeights, Number, Seed, Size, TrainedBiases, Turned
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig
from graphpeft.wording import shown

_ORDERS = {"db": (1, 38, 2), "sym": (2, 20, 2), "coif": (1, 17, 6)}
"""The first and the last order of each family of wavelets, and the number of a filter's elements for each order."""

_OTHERS_IN_PEFT = ("coif4", "coif5")
"""The wavelets for which PEFT has numbers that aren't their filters."""

_WITHOUT_DEFAULTS = ("rwkv", "rwkv7", "btlm")


@dataclass(frozen=True, kw_only=True)
class WaveFT(DeltaRule):
    """The change at one weight.

    Attributes:
        matrices: The matrices of the weight, each of which has a spectrum.
        shape: The shape of ΔW.
        length: The number of elements of the wavelet's filters; 0 where the spectrum is the change.
    """

    matrices: Matrices
    shape: tuple[int, ...]
    length: int

    scales: ClassVar[tuple[str, ...]] = ("scale",)
    needs_matrix: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses more coefficients than a matrix has, and filters that nobody knows."""
        reason = super().check(site, config) or too_many(site, config.frequencies_at(site))
        if reason is None and self.length > 2 and importlib.util.find_spec("pywt") is None:
            reason = (
                f"the filters of wavelet_family={config.wavelet_family!r} come from PyWavelets, which isn't installed; "
                "pip install 'graphpeft[wavelets]', or choose 'db1'"
            )
        return reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the spectrum, and its places and the filters, which follow from the config."""
        count = config.frequencies_at(site)
        made: dict[str, Any] = {"is_trained": False, "is_saved": False}
        specs = {
            "waveft_spectrum": ParameterSpec((*self.matrices.stack, count), key="waveft_spectrum"),
            "waveft_places": ParameterSpec((count,), "waveft_places", dtype=torch.int64, **made),
        }
        if self.length:
            specs["waveft_filters"] = ParameterSpec((2, self.length), "waveft_filters", **made)
        return specs

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws the places, in the middle of what the synthesis shortens, and the spectrum, unless it is zero."""
        drawn = places_drawn(self.matrices, config.frequencies_at(site), config.random_loc_seed)
        parameters["waveft_places"].copy_(self._in_bands(drawn) if self.length else drawn)
        if self.length:
            parameters["waveft_filters"].copy_(torch.tensor(filters_of(config.wavelet_family)))
        spectrum = parameters["waveft_spectrum"]
        spectrum.zero_() if config.init_weights else spectrum.normal_().mul_(0.01)

    def _in_bands(self, places: Tensor) -> Tensor:
        """Returns where PEFT has coefficients for places in a matrix: in which band, in which row and column of it.

        PEFT puts the matrix into the middle of a larger one, of which each quarter is a band.
        """
        _, rows, columns = self.matrices
        parted = []
        for place, size in ((places // columns, rows), (places % columns, columns)):
            half = band(size, self.length)
            within = place + half - size // 2 - size % 2
            parted.append((within // half, within % half, half))
        (below, row, high), (beside, column, wide) = parted
        return ((2 * below + beside) * high + row) * wide + column

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns s."""
        return {"scale": config.scaling}

    def delta(self, waveft_spectrum: Any, waveft_places: Any, scale: Any, waveft_filters: Any = None) -> Any:
        """Returns ΔW."""
        _, rows, columns = self.matrices
        return synthesised(waveft_spectrum, waveft_places, waveft_filters, rows, columns).reshape(self.shape) * scale


@register
@dataclass(kw_only=True)
class WaveFTConfig(TargetedConfig):
    """The options of WaveFT beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Bilican et al., "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", arXiv 2505.12532.

    The filters of all wavelets but ``"db1"`` come from PyWavelets, which ``pip install 'graphpeft[wavelets]'`` brings.

    Differs from PEFT: ``"coif4"`` and ``"coif5"`` are refused, since PEFT computes with numbers for them that aren't
    the filters of these wavelets. The 50 wavelets that PEFT names and has no filters for act here; PEFT can't run them.

    Attributes:
        n_frequency: The number of coefficients of each weight.
        scaling: The scale s.
        wavelet_family: The wavelet: ``"db1"`` to ``"db38"``, ``"sym2"`` to ``"sym20"``, ``"coif1"`` to ``"coif17"``.
        use_idwt: Whether the coefficients are those of wavelets; if False, they are elements of the change.
        random_loc_seed: The seed for the places of the coefficients.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"waveft_only"``, the adapted layers'.
        n_frequency_pattern: Other numbers of coefficients, by regular expressions for the end of a path; the first that
            matches counts.
        proportional_parameters: Whether the weights have coefficients in proportion to their sizes, `n_frequency` each
            on average; then `n_frequency_pattern` has no effect.
        init_weights: Whether the coefficients are zero at first; if False, they are drawn.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> config = WaveFTConfig(n_frequency=5, target_modules=["0"])
        >>> get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)[0].default.waveft_spectrum.shape
        torch.Size([5])
    """

    peft_type: ClassVar[PeftType] = PeftType.WAVEFT
    prefix: ClassVar[str | None] = "waveft_"
    patterns: ClassVar[Mapping[str, str]] = {"n_frequency": "n_frequency_pattern"}
    default_targets: ClassVar[targets.Defaults] = {
        **{name: named for name, named in DEFAULT_TARGET_MODULES.items() if name not in _WITHOUT_DEFAULTS},
        "gpt2": ("mlp.c_proj",),
        "gpt_bigcode": ("mlp.c_proj",),
    }

    n_frequency: Size = 2592
    scaling: Number = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: Seed = 777
    fan_in_fan_out: Turned = False
    bias: TrainedBiases[Literal["none", "all", "waveft_only"]] = "none"
    n_frequency_pattern: dict[str, Size] = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: InitWeights = True

    _proportional: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wavelet_family in _OTHERS_IN_PEFT:
            raise ValueError(
                f"wavelet_family={self.wavelet_family!r} is refused, since PEFT's numbers for it aren't its filters; "
                "choose another"
            )
        if not _length_of(self.wavelet_family):
            known = ", ".join(f"{name}{first} to {name}{last}" for name, (first, last, _) in _ORDERS.items())
            raise ValueError(f"wavelet_family must be one of {known}, not {shown(self.wavelet_family)}")

    def prepared(self, sites: Sequence[Any]) -> WaveFTConfig:
        """Returns the config that knows the numbers of coefficients in proportion to the weights' sizes."""
        config = copy.copy(self)
        sizes = {site.weight: matrices_of(site).size for site in sites} if self.proportional_parameters else {}
        budget = self.n_frequency * len(sizes)
        config._proportional = {  # type: ignore[misc]
            weight: max(1, round(size / sum(sizes.values()) * budget)) for weight, size in sizes.items()
        }
        return config

    def frequencies_at(self, site: Any) -> int:
        """Returns the number of coefficients of each matrix at a site.

        Args:
            site: The site.
        """
        if self.proportional_parameters:
            return self._proportional[site.weight]
        return self.value_at("n_frequency", site)

    def rule_for(self, site: Any, dtype: torch.dtype) -> WaveFT:
        """Returns the rule for a weight's shape."""
        length = _length_of(self.wavelet_family) if self.use_idwt else 0
        return WaveFT(matrices=matrices_of(site), shape=site.matrix_shape, length=length)


def _length_of(wavelet: str) -> int:
    """Returns the number of elements of a wavelet's filters; 0 for an unknown one."""
    found = re.fullmatch(r"(db|sym|coif)([1-9][0-9]?)", wavelet)
    if found is None:
        return 0
    (first, last, factor), order = _ORDERS[found[1]], int(found[2])
    return order * factor if first <= order <= last else 0
