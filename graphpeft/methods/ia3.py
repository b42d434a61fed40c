"""(IA)³: a learned factor for each feature that goes into a layer, or that comes out of it.

    y = W (l ⊙ x) + b         at `feedforward_modules`:  W' = W diag(l)
    y = l ⊙ (W x + b)         at the other targets:      W' = diag(l) W    b' = l ⊙ b

Each matrix in a stack, such as an expert's, has factors of its own. Source: Liu et al., "Few-Shot Parameter-Efficient
Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv 2205.05638; the same numbers as PEFT's
``tuners/ia3/layer.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.methods.default_targets import IA3_INPUTS, IA3_OUTPUTS
from graphpeft.methods.matrices import matrices_of
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.combination import Combination, Part
from graphpeft.rules.delta_rule import WeightRule
from graphpeft.rules.options import InitWeights, Turned
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.rule import InputRule, OperationRule, Rule
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.patterns import Pattern
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True)
class Factors(WeightRule):
    """The factors of one layer.

    Attributes:
        groups: The number of groups of a convolution's features.
    """

    groups: int = 1

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Convolution, ops.Weight)

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses weights that are neither matrices, nor stacks of matrices, nor kernels of convolutions."""
        if isinstance(site, LeafSite):
            return None
        reason = super().check(site, config)
        if reason is None and site.layout is not ops.Convolution and len(site.shape) not in (2, 3):
            reason = f"its {site.attribute} of shape {tuple(site.shape)} is no matrix, whose features have factors"
        return reason

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws the factors, and sets them to 1 where the config asks for it, as PEFT does."""
        parameters["ia3_l"].normal_()
        if config.init_ia3_weights:
            parameters["ia3_l"].fill_(1)

    def _beside(self, ia3_l: Any) -> Any:
        """Returns factors in a shape that broadcasts over features, which a convolution has in front of positions."""
        return ia3_l[0] if self.layout.kernel else ia3_l.flatten()

    def unmergeable(self, site: Any) -> str | None:
        """Refuses calls of layers, as PEFT does: quantised weights can't be scaled in place."""
        return "the factors of a quantised layer aren't merged, as in PEFT" if isinstance(site, LeafSite) else None


@dataclass(frozen=True)
class InputFactors(Factors, InputRule):
    """Factors for what goes into a layer."""

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the factors, (1, in), of each matrix in a stack, or with a 1 for each dimension of a kernel."""
        stack, _, columns = matrices_of(site)
        behind = (1,) * len(self.layout.kernel)
        shape = (1, site.in_features, *behind) if behind else (*stack, 1, columns)
        return {"ia3_l": ParameterSpec(shape, key="ia3_l")}

    def enter(self, x: Any, ia3_l: Any) -> Any:
        """Returns l ⊙ x."""
        return (x * self._beside(ia3_l)).to(x.dtype)

    def delta(self, weight: Any, ia3_l: Any) -> Any:
        """Returns W diag(l) − W; a group's kernels have the factors of its own features."""
        if self.groups == 1:
            return weight * (ia3_l - 1)
        grouped = weight.unflatten(0, (self.groups, -1))
        return (grouped * (ia3_l - 1).unflatten(1, (self.groups, -1)).transpose(0, 1)).flatten(0, 1)


@dataclass(frozen=True)
class OutputFactors(Factors, OperationRule):
    """Factors for what comes out of a layer, with its bias."""

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the factors: (out, 1), of each matrix in a stack; (1, out, 1, …) of a convolution."""
        stack, rows, _ = matrices_of(site)
        behind = (1,) * len(self.layout.kernel)
        shape = (1, rows, *behind) if behind else (*stack, rows, 1)
        return {"ia3_l": ParameterSpec(shape, key="ia3_l")}

    def rewrite(self, y: Any, ia3_l: Any) -> Any:
        """Returns l ⊙ y."""
        return (y * self._beside(ia3_l)).to(y.dtype)

    def delta(self, weight: Any, ia3_l: Any) -> Any:
        """Returns diag(l) W − W."""
        return weight * ((ia3_l.transpose(0, 1) if self.layout.kernel else ia3_l) - 1)

    def bias_delta(self, bias: Any, ia3_l: Any) -> Any:
        """Returns l ⊙ b − b."""
        return bias * (ia3_l.flatten() - 1)


@register
@dataclass(kw_only=True)
class IA3Config(TargetedConfig):
    """The options of (IA)³ beside the ones that name targets; the names, defaults and meanings are PEFT's.

    The matrices of a stack are (out, in), and (in, out) where its module has the attribute ``is_transposed`` with the
    value True, as those of experts in Transformers: how it is multiplied doesn't tell its outputs from its inputs.

    Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv
    2205.05638.

    Attributes:
        feedforward_modules: The targets whose inputs are scaled, in place of their outputs: a list of endings
            of their paths, or a regular expression for whole paths. None takes the default for the model's
            `model_type`.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        init_ia3_weights: Whether all factors are 1 at first; if False, they are drawn from a normal distribution.

    Raises:
        ValueError: For a value that an option can't have, and for `feedforward_modules` that aren't among the targets.

    Examples:
        >>> config = IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), config)
        >>> model[0].default.ia3_l.shape, model[2].default.ia3_l.shape
        (torch.Size([16, 1]), torch.Size([1, 16]))
    """

    peft_type: ClassVar[PeftType] = PeftType.IA3
    prefix: ClassVar[str | None] = "ia3_"
    lacks: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})
    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = {
        name: (*others, *IA3_INPUTS[name]) for name, others in IA3_OUTPUTS.items()
    }

    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: Turned = False
    init_ia3_weights: InitWeights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, list | tuple):
            self.feedforward_modules = set(self.feedforward_modules)
        named, among = self.feedforward_modules, self.target_modules
        if isinstance(named, set) and isinstance(among, set) and not named <= among:
            raise ValueError(f"feedforward_modules names {sorted(named - among)}, which target_modules doesn't name")

    def resolved(self, model: nn.Module) -> IA3Config:
        """Returns the config with `feedforward_modules` filled in."""
        config: Any = super().resolved(model)
        if config.feedforward_modules is None:
            try:
                named = set(targets.default_target_modules(model, IA3_INPUTS))
            except ValueError as error:
                raise ValueError(
                    "feedforward_modules is None, and no default is known for the model; name those targets whose "
                    "inputs are scaled, or give [] for none"
                ) from error
            among = config.target_modules
            if isinstance(among, set):
                # a file is read only if its feed-forward modules are targets
                inside = {name for name in named if any(name.endswith(f".{target}") for target in among)}
                config.target_modules = among | inside
                named = {target for target in config.target_modules if target.endswith(tuple(named))}
            config.feedforward_modules = named
        return config

    def rule_for(self, site: Any, dtype: torch.dtype) -> Rule:
        """Returns the rule for a layer's inputs or for its outputs."""
        rule = InputFactors if self._is_feed_forward(site.name) else OutputFactors
        return rule(groups=1 if isinstance(site, LeafSite) else site.groups)

    def _is_feed_forward(self, name: str) -> bool:
        named = self.feedforward_modules or ()
        if isinstance(named, str):
            return Pattern(named, named, "feedforward_modules").fullmatch(name) is not None
        return name.endswith(tuple(named))

    def combined(self, configs: Sequence[Any], sites: Sequence[Any], how: Combination) -> IA3Config:
        """Returns the config that names the targets of all.

        Raises:
            ValueError: If some name their targets by lists and others by patterns, or `combination_type` is for LoRA.
        """
        if how.kind not in ("linear", "svd"):  # the latter is the default of add_weighted_adapter
            raise ValueError(f"combination_type={how.kind!r} isn't for IA3, whose factors are summed; leave it out")
        config = copy.deepcopy(self)
        for name in ("target_modules", "feedforward_modules"):
            setattr(config, name, _union(name, [getattr(each, name) for each in configs]))
        config.modules_to_save = list(dict.fromkeys(n for each in configs for n in each.modules_to_save or ())) or None
        return config

    def combine(self, target: AdaptedSite, parts: Sequence[Part], how: Combination, count: int) -> Mapping[str, Tensor]:
        """Returns Σ wᵢ lᵢ, as PEFT does."""
        return {"ia3_l": torch.stack([part.tensors["ia3_l"] * part.weight for part in parts]).sum(0)}


def _union(option: str, values: Sequence[Any]) -> set[str] | str:
    """Returns the value of an option that names what these name."""
    if len({isinstance(value, str) for value in values}) > 1:
        raise ValueError(f"{option} is a pattern in some of them, and a list in others; spell it alike")
    if isinstance(values[0], str):
        return "|".join(f"({value})" for value in dict.fromkeys(values))
    return set[str]().union(*values)
