"""The base of the configs that name modules whose weights or calls the method adapts."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from torch import nn

from graphpeft.graph.errors import TraceError
from graphpeft.graph.paths import modules_by_path
from graphpeft.graph.traced_model import stands_for
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import Editable, Role, TargetOptions
from graphpeft.rules.peft_names import TaskType
from graphpeft.rules.report import Refusal, Report
from graphpeft.sites.calls import boundary_site
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.layer_kinds import layers_in
from graphpeft.sites.site import CallSite, LeafSite, Site
from graphpeft.targeting import pattern_values, targets
from graphpeft.targeting.targeting import targeted_modules, targeted_sites
from graphpeft.wording import joined


@dataclass(kw_only=True)
class TargetedConfig(PeftConfig):
    """A config with options that name targets; their names and meanings are PEFT's.

    Attributes:
        target_modules: Names of the weights to adapt: a list matches paths that are equal or end in ``.name``, a
            string is a regular expression for the whole path, or ``"all-linear"``. None takes the method's default for
            the model's `model_type`.
        exclude_modules: Names of modules to leave out, written as in `target_modules`.
        layers_to_transform: Indices of the layers to adapt, where `target_modules` is a list.
        layers_pattern: The name of the container of layers, before the layer's index in a path.

    Examples:
        >>> config = LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1])
        >>> isinstance(config, TargetedConfig)
        True
    """

    adapts_boundaries: ClassVar[bool] = False
    """Whether the sites are the boundaries of the named modules, for a `BoundaryRule`."""

    adapts_leaves: ClassVar[bool] = False
    """Whether the method's rules adapt the call of a module without a plain weight: a `LeafSite`."""

    patterns: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The options that have other values at some sites, each with the option that has these by patterns for names."""

    default_targets: ClassVar[targets.Defaults] = MappingProxyType({})
    """The default `target_modules`, by the `model_type` of the model's config, as in PEFT."""

    task_type: Editable[TaskType | None] = None
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
        """Raises ValueError for options that contradict each other or that this library doesn't support."""
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
        """The options that name modules and parameters, and the options with patterns for their names."""
        return TargetOptions(
            self.target_modules,
            self.exclude_modules,
            self.modules_to_save,
            self.layers_to_transform,
            self.layers_pattern,
            target_parameters=self.value_for(Role.PARAMETERS),
            patterns={pattern: getattr(self, pattern) for pattern in self.patterns.values()},
        )

    def value_at(self, option: str, site: Any) -> Any:
        """Returns the value of one of `patterns` at a site.

        Args:
            option: The option.
            site: The site.
        """
        patterns, default = getattr(self, self.patterns[option]), getattr(self, option)
        # a value that asks for no name holds for all sites that are alike
        return pattern_values.pattern_value(patterns, site.name, default) if patterns else default

    def resolved(self, model: nn.Module) -> PeftConfig:
        """Returns the config with `target_modules` filled in: the model's default, or the names for "all-linear"."""
        config = super().resolved(model)
        assert isinstance(config, TargetedConfig)
        if targets.is_all_linear(config.target_modules):
            config.target_modules = self._all_linear(model)
        elif config.target_modules is None:
            config.target_modules = self.targets_by_default(model)
        if config.target_modules:
            config.target_modules = targets.without_wrappers(config.target_modules, model)
        if config.exclude_modules:
            config.exclude_modules = targets.without_wrappers(config.exclude_modules, model)
        return config

    def _all_linear(self, model: nn.Module) -> set[str] | str:
        """Returns what names exactly the linear layers of a model."""
        modules = modules_by_path(model)
        names = targets.all_linear_names(model, self.task_type, modules)
        if not names and not self.target_options.target_parameters:
            has = f"a {stands_for(model).__name__} has no linear layers; it has {joined(layers_in(modules), most=10)}"
            if len(modules) == 1:
                has = "a layer by itself has no name: adapt the model that it is part of, or nn.Sequential(layer)"
            raise ValueError(f"target_modules='all-linear': {has}")
        return targets.exactly(names, modules)

    def targets_by_default(self, model: nn.Module) -> set[str] | str:
        """Returns the default `target_modules` of a model.

        Args:
            model: The model.

        Raises:
            ValueError: If the model has no default, and the config names no parameters instead.
        """
        try:
            default = targets.default_target_modules(model, self.default_targets)
        except ValueError:
            if self.target_options.target_parameters:
                return set()
            raise
        return default if isinstance(default, str) else set(default)

    def targeted_modules(self, modules: Mapping[str, nn.Module], report: Report) -> list[str]:
        """Returns the paths of the modules that the config names, of any class.

        Args:
            modules: The model's modules by path.
            report: Gets the excluded modules, or that nothing matched.
        """
        return targeted_modules(self, modules, report)

    def find_sites(self, finder: SiteFinder, report: Report) -> Sequence[Site | LeafSite | CallSite]:
        """Returns the sites that the config names."""
        if self.adapts_boundaries:
            return self._boundary_sites(finder, report)
        return targeted_sites(self, finder, report)

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
        """Returns a copy of the config that names exactly these sites: each as a module, or as a parameter."""
        config = copy.copy(self)
        config.layers_to_transform = config.layers_pattern = None
        # a layer's weight that was named as a parameter has no other name
        parameters = [site for site in sites if self._names_parameter(site)]
        modules = [site.name for site in sites if site not in parameters]
        config.target_modules = targets.exactly(modules, names)
        if self.option_for(Role.PARAMETERS):
            config._name_parameters([site.name for site in parameters], names)
        return config

    def _names_parameter(self, site: Any) -> bool:
        options = self.target_options
        return bool(options.target_parameters) and not site.is_layer and targets.match_parameter(options, site.name)

    def _name_parameters(self, paths: Sequence[str], names: Collection[str]) -> None:
        """Lets the config name exactly these parameters."""
        option = self.option_for(Role.PARAMETERS)
        vars(self)[option] = [targets.own_parameter_entry(path) for path in paths] or None
        also = sorted(
            name for name in names if targets.match_parameter(self.target_options, name) and name not in paths
        )
        if also:
            raise ValueError(f"{option} can't name {paths} without {also}; name them in target_modules")

    def for_file(self, sites: Sequence[Any]) -> PeftConfig:
        """Returns the config that tells of turned weights, with patterns of one name each, since PEFT sorts them."""
        changed: dict[str, Any] = {}
        for option, pattern in self.patterns.items():
            values = {site.name: self.value_at(option, site) for site in sites}
            changed[pattern] = pattern_values.exact_patterns(values, getattr(self, option))
        if option := self.option_for(Role.TURNED):
            changed[option] = bool(sites) and all(getattr(site, "transposed", False) for site in sites)
        config = super().for_file(sites)
        vars(config).update(changed)
        return config
