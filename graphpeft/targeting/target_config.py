"""What the configs of all methods share that adapt the weights, or the calls, of modules which they name."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from torch import nn

from graphpeft.graph.errors import TraceError
from graphpeft.graph.paths import TensorPaths
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.target_options import TargetOptions
from graphpeft.sites.calls import boundary_site
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite, LeafSite, Site
from graphpeft.targeting import targets
from graphpeft.targeting.targeting import targeted_modules, targeted_sites


@dataclass(kw_only=True)
class TargetedConfig(PeftConfig):
    """The options that name targets; the names and meanings are PEFT's.

    Attributes:
        target_modules: Names of the weights to adapt: a list matches paths that are equal or end in ``.name``, a
            string is a regular expression for the whole path, or ``"all-linear"``. None takes the method's default for
            the model's `model_type`.
        exclude_modules: As `target_modules`, for what is left out.
        layers_to_transform: Indices of the layers to adapt, where `target_modules` is a list.
        layers_pattern: The name before that index.

    Example:
        >>> config = LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1])
        >>> isinstance(config, TargetedConfig)
        True
    """

    not_of_tensors: ClassVar[frozenset[str]] = PeftConfig.not_of_tensors | {"task_type"}

    adapts_boundaries: ClassVar[bool] = False
    """Whether the sites are the boundaries of the modules that the config names, for a `BoundaryRule`."""

    adapts_leaves: ClassVar[bool] = False
    """Whether the method's rules take the call of a module as an operation, where it has no weight: a `LeafSite`."""

    default_targets: ClassVar[targets.Defaults] = MappingProxyType({})
    """What the method adapts where the config names nothing, by the `model_type` of the model's config, as in PEFT."""

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)
        self._check_targets()

    def check(self) -> None:
        """Raises ValueError for options that contradict each other, or that this library doesn't support."""
        super().check()
        self._check_targets()

    def _check_targets(self) -> None:
        of_layers = {"layers_to_transform": self.layers_to_transform, "layers_pattern": self.layers_pattern}
        for name, value in of_layers.items():
            if isinstance(self.target_modules, str) and value is not None:
                raise ValueError(f"{name} has no effect where target_modules is a string; write it into the pattern")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform")

    @property
    def target_options(self) -> TargetOptions:
        """The options that name modules and parameters, and those with patterns for their names."""
        return TargetOptions(
            self.target_modules,
            self.exclude_modules,
            self.modules_to_save,
            self.layers_to_transform,
            self.layers_pattern,
        )

    def resolved(self, model: nn.Module) -> PeftConfig:
        """Returns the config with its target modules filled in: the default of the model, or all linear ones."""
        config = super().resolved(model)
        assert isinstance(config, TargetedConfig)
        if targets.is_all_linear(config.target_modules):
            config.target_modules = set(targets.all_linear_names(model, config.task_type))
        elif config.target_modules is None:
            config.target_modules = self.targets_by_default(model)
        return config

    def targets_by_default(self, model: nn.Module) -> set[str] | str:
        """Returns the `target_modules` of a model for which the config names none.

        Args:
            model: The model.

        Raises:
            ValueError: If there are none for this model, and no parameters are named instead.
        """
        try:
            default = targets.default_target_modules(model, self.default_targets)
        except ValueError:
            if self.target_options.target_parameters:
                return set()
            raise
        return default if isinstance(default, str) else set(default)

    def targeted_modules(self, modules: Mapping[str, nn.Module], report: Report) -> list[str]:
        """Returns the paths of the modules that the config names, whatever they are.

        Args:
            modules: The model's modules by path.
            report: Gets what is excluded, or that nothing matched.
        """
        return targeted_modules(self, modules, report)

    def find_sites(
        self, finder: SiteFinder, report: Report, owned: TensorPaths
    ) -> Sequence[Site | LeafSite | CallSite]:
        """Returns the sites that the config names."""
        if self.adapts_boundaries:
            return self._boundary_sites(finder, report)
        return targeted_sites(self, finder, report, owned)

    def _boundary_sites(self, finder: SiteFinder, report: Report) -> list[CallSite]:
        found = []
        for path in self.targeted_modules(finder.modules, report):
            try:
                found.append(boundary_site(finder.regions, path))
            except TraceError as error:
                way_out = "leave it out with exclude_modules, or narrow target_modules"
                report.refused.append(Refusal(path, str(error), way_out))
        return found

    def naming(self, sites: Sequence[Any], names: Collection[str]) -> PeftConfig:
        """Returns the config that names these sites alone."""
        config = copy.copy(self)
        config.target_modules = targets.exactly([site.name for site in sites], names)
        config.layers_to_transform = config.layers_pattern = None
        return config
