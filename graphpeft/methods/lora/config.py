"""LoRA's options, by PEFT's names, and which of its rules adapts which site."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from graphpeft import ops
from graphpeft.boundaries import Leaf
from graphpeft.combining import Combination, Part
from graphpeft.config import OWN, PeftType, register
from graphpeft.methods.lora import combination
from graphpeft.methods.lora.convolution import LoraConvolution
from graphpeft.methods.lora.embedding import LoraEmbedding
from graphpeft.methods.lora.leaf import LoraLeaf
from graphpeft.methods.lora.linear import LoraLinear
from graphpeft.methods.lora.matrix import LoraExperts, LoraMatrix
from graphpeft.methods.lora.parts import LoraParts, as_stock
from graphpeft.methods.lora.target_parts import with_parts
from graphpeft.paths import TensorPaths
from graphpeft.report import Report
from graphpeft.rewrite import AdaptedSite, Rule
from graphpeft.sites import Site, SiteFinder
from graphpeft.target_config import TargetedConfig


@register
@dataclass(kw_only=True)
class LoraConfig(TargetedConfig):
    """LoRA's options beside those that name targets; the names, defaults and meanings are PEFT's.

    Attributes:
        r: The rank.
        target_parameters: Paths (or their ends) of weights that are plain parameters.
        lora_alpha: α.
        lora_dropout: The probability of dropping an element of the branch's input.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"lora_only"``, those of the adapted layers.
        use_rslora: Whether the scale is α/√r.
        init_lora_weights: True: A uniform as in ``nn.Linear``, B zero. ``"gaussian"``: A normal with deviation 1/r.
            False: both as in ``nn.Linear``, so that the adapter changes the outputs from the start.
        rank_pattern: Other ranks, by regular expression for the end of the path.
        alpha_pattern: Other α, likewise.
        target_parts: Not of PEFT's: the parts of fused projections that are adapted alone, by their names as in a list
            of `target_modules`: names among ``"q"``, ``"k"`` and ``"v"``, which the graph around a projection tells
            apart, or rows as pairs of the first one and the one behind the last. Each part has factors of the rank `r`.
        trainable_token_indices: Rows of the input embedding that are trained as they are, or such rows by the names of
            embeddings. What is tied to an embedding follows.
        layer_replication: Ranges of a Transformers model's layers that it runs in turn instead of its own, each with
            an adapter of its own and the same weights.
        ensure_weight_tying: Whether to refuse other rows for what is tied.
    """

    peft_type: ClassVar[PeftType] = PeftType.LORA
    adapts_leaves: ClassVar[bool] = True

    r: int = 8
    target_parameters: list[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    target_parts: dict[str, list[Any]] | None = field(default=None, metadata=OWN)

    # read and written as PEFT does, and refused when set; Any is a dict, or one of PEFT's classes for it
    alora_invocation_tokens: list[int] | None = None
    arrow_config: Any = None
    corda_config: Any = None
    ensure_weight_tying: bool = False
    eva_config: Any = None
    kasa_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    lora_bias: bool = False
    lora_ga_config: Any = None
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    monteclora_config: Any = None
    qalora_group_size: int = 16
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_bdlora: Any = None
    use_dora: bool = False
    use_qalora: bool = False
    velora_config: Any = None

    def __post_init__(self) -> None:
        # PEFT's type for them allows null, which files may hold
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        super().__post_init__()
        self._check_values()

    def check(self) -> None:
        """Raises ValueError for options of PEFT's that aren't supported: nothing is ignored in silence."""
        super().check()
        self._check_values()
        default = LoraConfig()
        for name in _UNSUPPORTED:
            value, only = getattr(self, name), getattr(default, name)
            if value and value != only:
                raise ValueError(f"{name}={value!r} is not supported; leave it {only!r}")
        if self.ensure_weight_tying and self.trainable_token_indices is None:
            raise ValueError(
                "ensure_weight_tying=True is supported for trainable_token_indices alone, not for an adapter of an "
                "embedding or modules_to_save; leave it False, and untie the weights if you adapt one of them"
            )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights must be True, False or 'gaussian', not {self.init_lora_weights!r}")

    def _check_values(self) -> None:
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if rank <= 0:
                raise ValueError(f"{name} must be a positive integer, not {rank!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout is the probability of dropping an element: 0 ≤ p < 1, not {self.lora_dropout}"
            )

    @property
    def starts_as_identity(self) -> bool:
        """Whether B starts at zero, and the weights stay as they are."""
        return self.init_lora_weights in (True, "gaussian")

    def for_file(self, sites: Sequence[Any]) -> LoraConfig:
        """Returns the config as PEFT reads it: weights that are no layer's are its `target_parameters`."""
        config = copy.deepcopy(self)
        for site in sites:
            if isinstance(site, Site) and site.parts:
                config.rank_pattern, config.alpha_pattern = (
                    {_exactly(site.name): value, **own}
                    for value, own in zip(
                        as_stock(site, self), (config.rank_pattern, config.alpha_pattern), strict=True
                    )
                )
        layers = [site for site in sites if site.is_layer]
        config.fan_in_fan_out = bool(layers) and all(getattr(site, "transposed", False) for site in sites)
        if len(layers) < len(sites):
            config.target_parameters = [site.weight for site in sites if not site.is_layer]
            config.target_modules = list(dict.fromkeys(site.name for site in layers))
            if config.lora_dropout:
                warnings.warn(
                    f"lora_dropout={config.lora_dropout} is saved as 0, since PEFT refuses dropout beside parameters; "
                    "set it in the loaded config to train further",
                    stacklevel=4,
                )
                config.lora_dropout = 0.0
        return config

    def fitted_to(self, keys: Collection[str]) -> LoraConfig:
        """Returns the config as it was before `for_file`: the ranks of parts are their own."""
        if not self.target_parts:
            return self
        config = copy.deepcopy(self)
        for own in (config.rank_pattern, config.alpha_pattern):
            for key in [key for key in own if key.startswith("^") and key.endswith("$")]:
                del own[key]
        return config

    def combined(self, configs: Sequence[Any], sites: Sequence[Any], how: Combination) -> LoraConfig:
        """Returns the config of an adapter that combines others: its rank is theirs or their sum, its scale 1."""
        return combination.combined_config(configs, sites, how)

    def combine(self, target: AdaptedSite, parts: Sequence[Part], how: Combination, count: int) -> dict[str, Any]:
        """Returns A and B of such an adapter at one site."""
        return combination.combine(target, parts, how, count)

    def find_sites(self, finder: SiteFinder, report: Report, owned: TensorPaths) -> list[Any]:
        """Returns the sites of the weights that the config names."""
        sites = super().find_sites(finder, report, owned)
        return with_parts(sites, self.target_parts or {}, finder, report)

    def rule_for(self, site: Any, dtype: torch.dtype) -> Rule:
        """Returns the rule for the kind of operation that uses the weight, or for a call."""
        if site.op is Leaf:
            return LoraLeaf(self.lora_dropout > 0)
        drops, casts = self.lora_dropout > 0, site.dtype != dtype
        if site.parts:
            return LoraParts(site.parts, site.is_layer and site.transposed, drops, casts)
        if site.layout is ops.Convolution:
            return LoraConvolution(site.transposed, drops, casts)
        if site.layout is ops.Embedding:
            return LoraEmbedding(casts)
        if site.layout is ops.Weight and len(site.shape) == 3:
            return LoraExperts(site.transposed)
        if site.op is ops.Weight:
            return LoraMatrix(site.is_layer and site.transposed)
        return LoraLinear(site.is_layer and site.transposed, drops, casts)


def _exactly(name: str) -> str:
    """Returns the key of `rank_pattern` that one site alone has."""
    return f"^{re.escape(name)}$"


_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "loftq_config",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "monteclora_config",
    "qalora_group_size",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
"""Options of PEFT's of which only the default is supported."""
