"""LoRA's options, by PEFT's names, and which of its rules adapts which site."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft import ops, targets
from graphpeft.config import PeftConfig, PeftType, register
from graphpeft.methods.lora.convolution import LoraConvolution
from graphpeft.methods.lora.corda import CordaConfig
from graphpeft.methods.lora.dora import Lora, with_magnitudes
from graphpeft.methods.lora.embedding import LoraEmbedding
from graphpeft.methods.lora.eva import EvaConfig
from graphpeft.methods.lora.initialisation import initialisation_of, takes_from_weight
from graphpeft.methods.lora.linear import LoraLinear
from graphpeft.methods.lora.lora_ga import LoraGAConfig
from graphpeft.methods.lora.matrix import LoraExperts, LoraMatrix
from graphpeft.report import Report
from graphpeft.rewrite import Rule
from graphpeft.sites import Site, SiteFinder
from graphpeft.targeting import targeted_sites


@register
@dataclass(kw_only=True)
class LoraConfig(PeftConfig):
    """LoRA's options; the names, defaults and meanings are PEFT's.

    Attributes:
        r: The rank.
        target_modules: Names of the weights to adapt: a list matches paths that are equal or end in ``.name``, a
            string is a regular expression for the whole path, or ``"all-linear"``. None takes the default of the
            model's `model_type`.
        target_parameters: Paths (or their ends) of weights that are plain parameters.
        exclude_modules: As `target_modules`, for what is left out.
        lora_alpha: α.
        lora_dropout: The probability of dropping an element of the branch's input.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"lora_only"``, those of the adapted layers.
        use_rslora: Whether the scale is α/√r.
        init_lora_weights: True: A uniform as in ``nn.Linear``, B zero. ``"gaussian"``: A normal with deviation 1/r.
            False: both as in ``nn.Linear``, so that the adapter changes the outputs from the start. ``"pissa"``,
            ``"pissa_niter_16"`` (in so many steps), ``"olora"``: a part of the weight, which is taken from it.
            ``"mica"``: B the weight's minor directions, which aren't trained. ``"orthogonal"``: random, with B A = 0.
            ``"corda"``, ``"lora_ga"``: as `preprocess_corda` and `preprocess_loraga` have measured. ``"eva"``: as
            `initialize_lora_eva_weights` measures afterwards.
        corda_config: A `CordaConfig`, or its values as a dict.
        eva_config: An `EvaConfig`, or its values as a dict.
        lora_ga_config: A `LoraGAConfig`, or its values as a dict.
        use_dora: Whether a vector of its own learns the lengths of the weight's rows.
        lora_bias: Whether B has a bias, which is trained.
        layers_to_transform: Indices of the layers to adapt, where `target_modules` is a list.
        layers_pattern: The name before that index.
        rank_pattern: Other ranks, by regular expression for the end of the path.
        alpha_pattern: Other α, likewise.
    """

    peft_type: ClassVar[PeftType] = PeftType.LORA

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    corda_config: Any = None
    eva_config: Any = None
    lora_ga_config: Any = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    # read and written as PEFT does, and refused when set; Any is a dict, or one of PEFT's classes for it
    alora_invocation_tokens: list[int] | None = None
    arrow_config: Any = None
    ensure_weight_tying: bool = False
    kasa_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    monteclora_config: Any = None
    qalora_group_size: int = 16
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_bdlora: Any = None
    use_qalora: bool = False
    velora_config: Any = None

    def __post_init__(self) -> None:
        # PEFT's type for them allows null, which files may hold
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        for name, (_, config_class) in _NESTED.items():
            setattr(self, name, _nested(getattr(self, name), config_class, name))
        super().__post_init__()
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)
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
        initialisation_of(self.init_lora_weights)
        for name, (kind, _) in _NESTED.items():
            if getattr(self, name) is not None and self.init_lora_weights != kind:
                raise ValueError(f"{name} has no effect unless init_lora_weights is {kind!r}; leave it None")

    def _check_values(self) -> None:
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if rank <= 0:
                raise ValueError(f"{name} must be a positive integer, not {rank!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout is the probability of dropping an element: 0 ≤ p < 1, not {self.lora_dropout}"
            )
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect where target_modules is a string; write it into the pattern")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias=True isn't for DoRA, as in PEFT: leave use_dora or lora_bias out")
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(
                f"lora_bias=True needs init_lora_weights True or False, as in PEFT, not {self.init_lora_weights!r}"
            )
        if self.use_dora and self.init_lora_weights == "mica":
            raise ValueError("init_lora_weights='mica' isn't for DoRA, as in PEFT: leave use_dora out")

    def resolved(self, model: nn.Module) -> LoraConfig:
        """Returns the config with its target modules filled in: the default of the model, or all linear ones."""
        config = super().resolved(model)
        assert isinstance(config, LoraConfig)
        if targets.is_all_linear(config.target_modules):
            config.target_modules = set(targets.all_linear_names(model, config.task_type))
        elif config.target_modules is None:
            config.target_modules = _default_targets(model, optional=bool(config.target_parameters))
        return config

    def for_file(self, sites: Sequence[Site]) -> LoraConfig:
        """Returns the config as PEFT reads it: weights that are no layer's are its `target_parameters`."""
        config = copy.deepcopy(self)
        layers = [site for site in sites if site.is_layer]
        config.fan_in_fan_out = bool(layers) and all(site.transposed for site in sites)
        if len(layers) < len(sites):
            config.target_parameters = [site.weight for site in sites if not site.is_layer]
            config.target_modules = [site.name for site in layers]
            if config.lora_dropout:
                warnings.warn(
                    f"lora_dropout={config.lora_dropout} is saved as 0, since PEFT refuses dropout beside parameters; "
                    "set it in the loaded config to train further",
                    stacklevel=4,
                )
                config.lora_dropout = 0.0
        return config

    def converted(
        self, tensors: Mapping[str, Tensor], first: Mapping[str, Tensor]
    ) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Returns plain LoRA of twice the rank: B A − B₀ A₀ = [B, −B₀] [A; A₀], where B₀ A₀ was taken from the weight.

        Raises:
            ValueError: If a rank's scale can't stay as it is.
        """
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                "path_initial_model_for_weight_conversion doubles ranks, and with use_rslora=True beside rank_pattern "
                "or alpha_pattern no α keeps the scale; leave it None"
            )
        if not takes_from_weight(self):
            raise ValueError(
                f"path_initial_model_for_weight_conversion is for adapters that have taken a part of the weights, and "
                f"init_lora_weights={self.init_lora_weights!r} takes none; leave it None"
            )
        config = copy.deepcopy(self)
        config.init_lora_weights, config.corda_config, config.lora_ga_config = True, None, None
        config.r, config.lora_alpha = 2 * self.r, self.lora_alpha * (2**0.5 if self.use_rslora else 2)
        config.rank_pattern = {key: 2 * rank for key, rank in self.rank_pattern.items()}
        config.alpha_pattern = {key: 2 * alpha for key, alpha in self.alpha_pattern.items()}
        changed = dict(tensors)
        for key, tensor in tensors.items():
            if key.endswith(".lora_A.weight"):
                changed[key] = torch.cat((tensor, first[key]), dim=0)
            elif key.endswith(".lora_B.weight"):
                changed[key] = torch.cat((tensor, -first[key]), dim=1)
        return config, changed

    def find_sites(self, finder: SiteFinder, report: Report, owned: frozenset[str]) -> list[Site]:
        """Returns the sites of the weights that the config names."""
        return targeted_sites(self, finder, report, owned)

    def rule_for(self, site: Site, dtype: torch.dtype) -> Rule:
        """Returns the rule for the kind of operation that uses the weight."""
        lora = self._lora_for(site, dtype)
        return with_magnitudes(lora, site) if self.use_dora else lora

    def _lora_for(self, site: Site, dtype: torch.dtype) -> Lora:
        drops, casts = self.lora_dropout > 0, site.dtype != dtype
        if site.layout is ops.Convolution:
            return LoraConvolution(site.transposed, drops, casts, self.lora_bias)
        if site.layout is ops.Embedding:
            return LoraEmbedding(casts)
        if site.layout is ops.Weight and len(site.shape) == 3:
            return LoraExperts(site.transposed)
        if site.op is ops.Weight:
            return LoraMatrix(site.is_layer and site.transposed)
        return LoraLinear(site.is_layer and site.transposed, drops, casts, self.lora_bias)


_NESTED: dict[str, tuple[str, type]] = {
    "corda_config": ("corda", CordaConfig),
    "eva_config": ("eva", EvaConfig),
    "lora_ga_config": ("lora_ga", LoraGAConfig),
}
"""The options that have options of their own, with the `init_lora_weights` that they are for."""


def _nested(value: Any, config_class: type, name: str) -> Any:
    """Returns options within options as what they are here, whether they come as a dict or as PEFT's class for them."""
    if value is None or isinstance(value, config_class):
        return value
    values = value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = dataclasses.asdict(value)
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a {config_class.__name__}, a dict of its values or None, not {value!r}")
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return config_class(**values)


_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "monteclora_config",
    "qalora_group_size",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Options of PEFT's of which only the default is supported."""


def _default_targets(model: nn.Module, optional: bool) -> set[str] | str:
    try:
        default = targets.default_target_modules(model)
    except ValueError:
        if optional:
            return set()
        raise
    return default if isinstance(default, str) else set(default)
