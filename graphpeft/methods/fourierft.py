"""FourierFT: a change of a weight that is the Fourier transform of a few trained coefficients.

    ΔW = s · Re F⁻¹(S)        S (out, in): zeros, but for the spectrum at places that are drawn once, from a seed

Source: Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", arXiv 2405.03003; the same
numbers as PEFT's ``tuners/fourierft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.matrices import Matrices, matrices_of
from graphpeft.methods.placed import placed
from graphpeft.rules.delta_rule import DeltaRule
from graphpeft.rules.options import InitWeights, Number, Seed, Size, TargetOptions, TrainedBiases, Turned
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.targeting import pattern_values, targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class FourierFT(DeltaRule):
    """The change at one weight.

    Attributes:
        matrices: The matrices of the weight, each of which has a spectrum.
        shape: The shape of ΔW.
    """

    matrices: Matrices
    shape: tuple[int, ...]

    scales: ClassVar[tuple[str, ...]] = ("scale",)
    needs_matrix: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses more frequencies than a matrix has."""
        reason = super().check(site, config)
        if reason is None:
            reason = too_many(site, config.frequencies_at(site))
        return reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the spectrum, and its places in a matrix, which follow from the seed."""
        count = config.frequencies_at(site)
        places = ParameterSpec((count,), "fourierft_places", is_trained=False, is_saved=False, dtype=torch.int64)
        spectrum = ParameterSpec((*self.matrices.stack, count), key="fourierft_spectrum")
        return {"fourierft_spectrum": spectrum, "fourierft_places": places}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws the places, and the spectrum, which is set to zero where the config asks for it."""
        drawn = places_drawn(self.matrices, parameters["fourierft_places"].numel(), config.random_loc_seed)
        parameters["fourierft_places"].copy_(drawn)
        parameters["fourierft_spectrum"].normal_()
        if config.init_weights:
            parameters["fourierft_spectrum"].zero_()

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns s."""
        return {"scale": config.scaling}

    def delta(self, fourierft_spectrum: Any, fourierft_places: Any, scale: Any) -> Any:
        """Returns ΔW."""
        _, rows, columns = self.matrices
        return transformed(fourierft_spectrum, fourierft_places, rows, columns).reshape(self.shape) * scale


def too_many(site: Any, count: int) -> str | None:
    """Returns that a matrix of a site's weight has fewer elements than are asked for, as a reason, or None."""
    _, rows, columns = matrices_of(site)
    if count <= rows * columns:
        return None
    return f"n_frequency={count} is more than the {rows * columns} elements of its {site.attribute}, {rows}×{columns}"


def places_drawn(matrices: Matrices, count: int, seed: int) -> Tensor:
    """Returns places in a matrix, counted row by row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(matrices.rows * matrices.columns, generator=generator)[:count]


@recorded
def transformed(spectrum: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    """Returns the real part of the inverse Fourier transform of a matrix that has a spectrum at some places.

    Args:
        spectrum: The elements at the places, (…, n).
        places: The places, counted row by row, (n,).
        rows: The number of rows.
        columns: The number of columns.
    """
    # there is no transform in half precision
    dense = placed(spectrum.float(), places, rows * columns).unflatten(-1, (rows, columns))
    return torch.fft.ifft2(dense).real.to(spectrum.dtype)


@register
@dataclass(kw_only=True)
class FourierFTConfig(TargetedConfig):
    """The options of FourierFT beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", arXiv 2405.03003.

    Attributes:
        n_frequency: The number of coefficients of each weight.
        scaling: The scale s.
        random_loc_seed: The seed for the places of the coefficients.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"fourier_only"``, the adapted layers'.
        n_frequency_pattern: Other numbers of coefficients, by regular expressions for what is behind a dot of a path,
            or by whole paths; the first that matches counts.
        init_weights: Whether the coefficients are zero at first; if False, they are drawn from a normal distribution.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> config = FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)[0].default.fourierft_spectrum.shape
        torch.Size([5])
    """

    peft_type: ClassVar[PeftType] = PeftType.FOURIERFT
    prefix: ClassVar[str | None] = "fourierft_"
    default_targets: ClassVar[targets.Defaults] = {
        **DEFAULT_TARGET_MODULES,
        "gpt2": ("mlp.c_proj",),
        "gpt_bigcode": ("mlp.c_proj",),
    }

    n_frequency: Size = 1000
    scaling: Number = 150.0
    random_loc_seed: Seed = 777
    fan_in_fan_out: Turned = False
    bias: TrainedBiases[Literal["none", "all", "fourier_only", "fourierft_only"]] = "none"
    n_frequency_pattern: dict[str, Size] | None = field(default_factory=dict)
    init_weights: InitWeights = False

    @property
    def target_options(self) -> TargetOptions:
        """The options that name modules, and those with patterns for their names."""
        patterns = {"n_frequency_pattern": self.n_frequency_pattern or {}}
        return super().target_options._replace(patterns=patterns)

    def frequencies_at(self, site: Any) -> int:
        """Returns the number of coefficients at a site.

        Args:
            site: The site.
        """
        patterns, count = self.n_frequency_pattern, self.n_frequency
        return pattern_values.value_below(patterns, site.name, count, "n_frequency_pattern") if patterns else count

    def rule_for(self, site: Any, dtype: torch.dtype) -> FourierFT:
        """Returns the rule for a weight's shape."""
        return FourierFT(matrices=matrices_of(site), shape=site.matrix_shape)
