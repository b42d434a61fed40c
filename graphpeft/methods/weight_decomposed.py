"""Weight decomposition: another method gives the direction of a weight, and a vector of its own the length.

    W' = m · (W + ΔW) / n            n = ‖W₀ + ΔW‖, for each output feature, of the base's weight W₀

ΔW is the other method's change, of LoHa or LoKr for example. m, the magnitudes, start as n; n gets no gradient. A fresh
adapter is the identity where the other method's is. For LoRA as the direction this is DoRA, which is
``LoraConfig(use_dora=True)``; PEFT has it for no other method. Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank
Adaptation", arXiv 2402.09353.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft.graph.computed_weights import read_weight
from graphpeft.rules.arguments import asked_by
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.delta_rule import DeltaRule
from graphpeft.rules.options import Editable, TargetOptions
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec
from graphpeft.rules.peft_names import TaskType
from graphpeft.rules.registry import register
from graphpeft.rules.report import Report
from graphpeft.rules.trained import Biases
from graphpeft.sites.finder import SiteFinder
from graphpeft.targeting.target_config import TargetedConfig

_OF_FILES_AND_STEPS = ("after_step", "converted", "derived_tensors", "fitted_to", "packed", "penalty", "unpacked")
"""The functions of a config that see all tensors, which a direction can't have: there is one tensor more."""


@dataclass(frozen=True, kw_only=True)
class WeightDecomposed(DeltaRule):
    """The change of a weight in direction and in length.

    Attributes:
        direction: The other method's rule for the site.
        dimensions: How many dimensions of the weight a length is over: 1, and those of a kernel.
    """

    direction: Any
    dimensions: int = 1

    def at_site(self, site: Any, dtype: torch.dtype) -> WeightDecomposed:
        """Returns both rules for a site's weight."""
        own: Any = super().at_site(site, dtype)
        return dataclasses.replace(own, direction=self.direction.at_site(site, dtype))

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses the same as the other method, and what isn't just a change of the weight there."""
        if not isinstance(self.direction, DeltaRule):
            return f"{config.direction.method} does more there than to add a change to a weight"
        reason = self.direction.check(site, config.direction) or super().check(site, config)
        if reason is None and self.direction.changes_bias:
            return f"{config.direction.method} changes biases, too, which have no direction"
        acts = set(self.direction.constants(site, config.direction)) if reason is None else set()
        elsewhere = sorted(acts.difference(asked_by(self.direction.delta).names))
        return f"{elsewhere[0]} acts on more than the change; set it to 0" if elsewhere else reason

    def dropout_of(self, config: Any) -> float:
        """Returns the other method's probability."""
        return self.direction.dropout_of(config.direction)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the other method's parameters, and the magnitudes."""
        magnitude = ParameterSpec(site.matrix_shape[: -self.dimensions], key="magnitude")
        return {**self.direction.parameters(site, config.direction), "magnitude": magnitude}

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns the other method's constants."""
        return self.direction.constants(site, config.direction)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Gives the other method's parameters their values, and takes the lengths as magnitudes."""
        own = {name: tensor for name, tensor in parameters.items() if name != "magnitude"}
        self.direction.initialise(own, site, config.direction, module)
        stored = read_weight(module, site.attribute)
        assert stored is not None
        weight = self._seen(stored.detach().to(parameters["magnitude"].device), [*own.values()])
        lengths = self._lengths(weight + self._change(weight, {**own, **self.constants(site, config)}))
        parameters["magnitude"].copy_(lengths.view(parameters["magnitude"].shape))

    def delta(self, weight: Any, base: Any, magnitude: Any, **own: Any) -> Any:
        """Returns W' − W; changes of W by adapters before are scaled with it."""
        change = self._change(weight, own)
        reads_weight = not {"weight", "base"}.isdisjoint(asked_by(self.direction.delta).names)
        lengths = self._lengths(base + (self._change(base, own) if reads_weight else change)).detach()
        return magnitude.view(lengths.shape) / lengths * (weight + change) - weight

    def _lengths(self, changed: Any) -> Any:
        """Returns the lengths of a weight, in a shape that goes with it."""
        return torch.linalg.vector_norm(changed, dim=tuple(range(-self.dimensions, 0)), keepdim=True)

    def _change(self, weight: Any, own: Mapping[str, Any]) -> Any:
        given = {**own, "weight": weight, "base": weight}
        return self.direction.delta(**{name: given[name] for name in asked_by(self.direction.delta).among(given)})


@register
@dataclass(kw_only=True)
class WeightDecomposedConfig(PeftConfig):
    """A method whose change of a weight gives only its direction. PEFT can't read its files, and says so.

    Attributes:
        direction: The other method's config, with the targets; in files, its options as a dict. Options that all
            methods have, such as `modules_to_save`, are taken from it where they aren't set here.

    Raises:
        ValueError: If `direction` is no config of a method that adds a change to named weights.

    Examples:
        >>> config = WeightDecomposedConfig(direction=LoHaConfig(r=2, target_modules=["0"]))
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> model[0].default.magnitude.shape
        torch.Size([16])
    """

    peft_type: ClassVar[Any] = "GRAPHPEFT_WEIGHT_DECOMPOSED"

    task_type: Editable[TaskType | None] = None
    direction: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.direction, Mapping):
            self.direction = PeftConfig.from_dict(self.direction)
        self._check_direction()
        self.direction = copy.copy(self.direction)
        for option in dataclasses.fields(PeftConfig):
            if getattr(self, option.name) == option.default:
                setattr(self, option.name, getattr(self.direction, option.name))
            setattr(self.direction, option.name, getattr(self, option.name))
        super().__post_init__()

    def check(self) -> None:
        """Raises ValueError for options that this library doesn't support, and for invalid values."""
        super().check()
        self._check_direction()
        self.direction.check()

    def _check_direction(self) -> None:
        if not isinstance(self.direction, TargetedConfig):
            raise ValueError(
                f"direction is a {type(self.direction).__name__}; give a config that names weights, such as LoHaConfig"
            )
        if self.direction.method == "LORA":
            raise ValueError("LoRA has this itself: take LoraConfig(use_dora=True)")
        cls = type(self.direction)
        seeing = [name for name in _OF_FILES_AND_STEPS if getattr(cls, name) is not getattr(PeftConfig, name)]
        if seeing or self.direction.takes_product:
            raise ValueError(f"{self.direction.method} can't be a direction: it does more than to change each weight")

    def to_dict(self) -> dict[str, Any]:
        """Returns the keys of a file with plain values."""
        return {**super().to_dict(), "direction": self.direction.to_dict()}

    @property
    def starts_as_identity(self) -> Any:
        """Whether the direction does."""
        return self.direction.starts_as_identity

    @property
    def target_options(self) -> TargetOptions:
        """The options of the direction."""
        return self.direction.target_options._replace(modules_to_save=self.modules_to_save)

    @property
    def trained_biases(self) -> Biases:
        """The biases that the direction trains."""
        return self.direction.trained_biases

    def find_sites(self, finder: SiteFinder, report: Report) -> Sequence[Any]:
        """Returns the sites of the direction."""
        return self.direction.find_sites(finder, report)

    def resolved(self, model: nn.Module) -> PeftConfig:
        """Returns the config with the options filled in that depend on the model."""
        return self._with(super().resolved(model), self.direction.resolved(model))

    def prepared(self, sites: Sequence[Any]) -> PeftConfig:
        """Returns the config with values that depend on all sites together."""
        return self._with(self, self.direction.prepared(sites))

    def naming(self, sites: Sequence[Any], names: Collection[str]) -> PeftConfig:
        """Returns the config that names exactly these sites."""
        return self._with(self, self.direction.naming(sites, names))

    def for_file(self, sites: Sequence[Any]) -> PeftConfig:
        """Returns the config with the direction's for a file."""
        return self._with(self, self.direction.for_file(sites))

    def file_form(self, site: Any, name: str, spec: ParameterSpec) -> FileForm | None:
        """Returns the form of the direction's parameters in files."""
        return spec.form if name == "magnitude" else self.direction.file_form(site, name, spec)

    def rule_for(self, site: Any, dtype: torch.dtype) -> WeightDecomposed:
        """Returns the rule around the direction's."""
        direction = self.direction.rule_for(site, dtype)
        return WeightDecomposed(direction=direction, dimensions=1 + len(site.kernel))

    @staticmethod
    def _with(config: PeftConfig, direction: PeftConfig) -> PeftConfig:
        changed: Any = copy.copy(config)
        changed.direction = direction
        return changed
