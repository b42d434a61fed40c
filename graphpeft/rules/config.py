"""The base class of all methods' configs, which read and write PEFT's JSON.

A config class defines its method: it chooses the rule for each site. The rest of the library uses only this interface.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from graphpeft.peft_classes import class_in_peft, config_class, hint_for_peft, set_class
from graphpeft.rules.config_in_calls import ConfigInCalls
from graphpeft.rules.config_json import OWN as OWN
from graphpeft.rules.config_json import ConfigJson
from graphpeft.rules.config_training import ConfigTraining
from graphpeft.rules.options import Editable, Role, TargetOptions, check_options, options_for
from graphpeft.rules.peft_names import HEADS, PEFT_VERSION, TaskType
from graphpeft.rules.plain_values import ATOMS, default_of, fields_of, plain
from graphpeft.rules.registry import names_method
from graphpeft.wording import shown

if TYPE_CHECKING:
    from graphpeft.rules.adapted_site import AdaptedSite
    from graphpeft.rules.combination import Combination, Part
    from graphpeft.rules.parameter_spec import FileForm, ParameterSpec
    from graphpeft.rules.report import Report
    from graphpeft.rules.rule import Rule
    from graphpeft.rules.trained import Biases, FullyTrainedModule, TableRows
    from graphpeft.rules.weight_reader import WeightReader
    from graphpeft.sites.finder import SiteFinder
    from graphpeft.sites.site import CallSite, LeafSite, Site


@names_method
@dataclass(kw_only=True)
class PeftConfig(ConfigInCalls, ConfigJson, ConfigTraining):
    """The options of all methods; their names and meanings are PEFT's.

    Attributes:
        task_type: The model's task; None for any module.
        base_model_name_or_path: The name or path of the base model.
        revision: The revision of the base model on the Hub.
        inference_mode: Whether the adapter is for inference, so that nothing is trained.
        auto_mapping: The base model's class and library, if there is no `task_type`.
        peft_version: The version of PEFT whose format the files have.
        modules_to_save: Names of modules to train fully and save, matched by the end of their path.

    Examples:
        >>> LoraConfig(r=4).save_pretrained("adapter")
        >>> type(PeftConfig.from_pretrained("adapter")).__name__
        'LoraConfig'
    """

    # a PeftType, or a user's str; Any, since subclasses couldn't narrow a union
    peft_type: ClassVar[Any]

    __class__ = property(class_in_peft, set_class)  # pyright: ignore

    file_prefix: ClassVar[str] = "base_model.model."
    """The prefix in files of the names of tensors inside the model."""

    lacks: ClassVar[frozenset[str]] = frozenset()
    """Inherited options that the method doesn't have, as in PEFT: they can't be set, and files lack them."""

    prefix: ClassVar[str | None] = None
    """How the rules' names of the method's tensors begin, by which PEFT's users find these; None if they vary."""

    is_resolved: ClassVar[bool] = False
    """Whether the options that depend on a model are filled in, as in the config of each adapter."""

    task_type: TaskType | None = None
    base_model_name_or_path: Editable[str | None] = None
    revision: Editable[str | None] = None
    inference_mode: Editable[bool] = False
    auto_mapping: Editable[dict[str, Any] | None] = None
    peft_version: Editable[str | None] = PEFT_VERSION
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None:
            if self.task_type not in list(TaskType):
                raise ValueError(
                    f"task_type is {shown(self.task_type)}; choose one of {[task.value for task in TaskType]}"
                )
            self.task_type = TaskType(self.task_type)
        for field in fields_of(type(self)):
            # PEFT's types for mappings allow null, which files may hold
            if field.default_factory is dict and getattr(self, field.name) is None:
                setattr(self, field.name, {})
        check_options(self)

    @property
    def method(self) -> str:
        """The method's name: its `peft_type`."""
        return plain(self.peft_type)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method gives the model a prompt, and leaves its weights alone."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method gives attentions learned tokens to read, as PEFT's adaption prompt does."""
        return False

    @property
    def starts_as_identity(self) -> bool | Literal["within rounding"]:
        """Whether a fresh adapter of this config changes no output; the laws in `graphpeft.testing` check it.

        True means bit for bit, in half precision within rounding. ``"within rounding"`` is for factors whose product
        is the identity only in exact arithmetic, such as two equal reflections. By default, as the option with the role
        `Role.IDENTITY` says.
        """
        return bool(self.value_for(Role.IDENTITY))

    def option_for(self, role: Role) -> str:
        """Returns the name of the option that has a role, or "" if none has.

        Args:
            role: The role, which annotations of options tell: ``bias: TrainedBiases[...]``.
        """
        return next(iter(options_for(type(self), role)), "")

    def value_for(self, role: Role) -> Any:
        """Returns the value of the option that has a role, or None if none has.

        Args:
            role: The role.
        """
        option = self.option_for(role)
        return getattr(self, option) if option else None

    def check(self) -> None:
        """Raises ValueError for options that this library doesn't support, and for invalid values."""
        check_options(self)
        for field in fields_of(type(self)):
            if field.name in self.lacks and plain(getattr(self, field.name)) != default_of(field):
                raise ValueError(f"{type(self).__name__} has no option {field.name!r}; leave it {default_of(field)!r}")

    @property
    def changes(self) -> dict[str, Any]:
        """The options that `after_step` has changed."""
        return {name: copy.copy(getattr(self, name)) for name in self.changed_by_training}

    @property
    def unchanged(self) -> dict[str, Any]:
        """The same options as they are by default."""
        return {field.name: default_of(field) for field in fields_of(type(self)) if field.name in self.changes}

    @property
    def target_options(self) -> TargetOptions:
        """The options that name modules and parameters, and the options with patterns for their names."""
        return TargetOptions(modules_to_save=self.modules_to_save)

    @property
    def trained_biases(self) -> Biases:
        """The biases of the model to train; by default, as the option with the role `Role.BIASES` says."""
        value = self.value_for(Role.BIASES) or "none"
        return value if value in ("none", "all") else "adapted"

    @property
    def takes_product(self) -> bool:
        """Whether a new adapter takes from the weights what its tensors make at first."""
        return False

    @property
    def keeps_tied(self) -> bool:
        """Whether tied weights of the model stay tied: trained copies are one tensor, and trained rows are the same.

        By default, as the option with the role `Role.TYING` says.
        """
        return bool(self.value_for(Role.TYING))

    @property
    def replicated_layers(self) -> Sequence[Sequence[int]] | None:
        """The ranges of layers that a Transformers model runs in turn in place of its own order; None for its own."""
        return None

    def find_fully_trained(self, modules: Mapping[str, nn.Module], report: Report) -> Mapping[str, FullyTrainedModule]:
        """Returns the modules that the method trains fully, besides `modules_to_save`, by path.

        Args:
            modules: The model's modules by path.
            report: Gets excluded and refused names, or that nothing matched.
        """
        return {}

    def find_rows(self, modules: Mapping[str, nn.Module], report: Report) -> Mapping[str, TableRows]:
        """Returns the rows of weights to train directly, by the path of the weight's module.

        A module that is tied to an embedding trains the embedding's rows, unless the config names other rows for it.

        Args:
            modules: The model's modules by path.
            report: Gets excluded and refused names, or that nothing matched.
        """
        return {}

    def initialise_rows(self, rows: torch.Tensor) -> None:
        """Initialises trained rows in place.

        Args:
            rows: The copied rows of the table, of shape (rows, features), in the table's dtype.
        """

    def find_sites(self, finder: SiteFinder, report: Report) -> Sequence[Site | LeafSite | CallSite]:
        """Returns the sites that the config adapts in the model.

        Args:
            finder: Finds sites in the model.
            report: Gets excluded and refused names.
        """
        raise NotImplementedError

    def naming(self, sites: Sequence[Any], names: Collection[str]) -> PeftConfig:
        """Returns the config that names exactly these of its sites.

        Args:
            sites: Some of the sites of the config, which is resolved for the model.
            names: All names in the model that a config could name.

        Raises:
            ValueError: If no config of the method can name exactly these sites.
        """
        raise ValueError(f"a {type(self).__name__} can't name some of its sites; leave where out")

    def prepared(self, sites: Sequence[Any]) -> PeftConfig:
        """Returns the config with values that depend on all sites together, such as the size of a shared tensor.

        Each plan calls this method once, before any rule. Store such a value in an attribute that is no field: files
        don't need it, since it follows from the config and the model.

        Args:
            sites: All sites of the config in the model, in the order in which initial values are drawn.

        Raises:
            ValueError: If the config can't adapt these sites.
        """
        return self

    def measured(self, sites: Sequence[Any], weights: WeightReader) -> PeftConfig:
        """Returns the config with values that depend on the numbers in the weights, such as sizes of tensors.

        Each plan calls this method once, after `prepared`; values are stored in the same way.

        Args:
            sites: All sites of the config in the model, in the order in which initial values are drawn.
            weights: Reads their weights, as they are without adapters.

        Raises:
            ValueError: If the config can't adapt these sites.
        """
        return self

    def with_weights(self, sites: Sequence[Any], weights: WeightReader) -> PeftConfig:
        """Returns the config that rules' `initialise` and `complete` get, with what is made of several sites' weights.

        It has no other use, and may keep the reader, so that nothing is made unless a rule asks for it.

        Args:
            sites: The adapter's sites.
            weights: Reads their weights, as they are without adapters.
        """
        return self

    def conflict(self, others: Mapping[str, Any]) -> str | None:
        """Returns why a model can't have this adapter beside its others, or None.

        Args:
            others: The configs of the model's adapters, by name.
        """
        return None

    def rule_for(self, site: Any, dtype: torch.dtype) -> Rule:
        """Returns the rule that adapts a site.

        Args:
            site: The site.
            dtype: The dtype of the adapter's parameters there.
        """
        raise NotImplementedError

    def file_form(self, site: Any, name: str, spec: ParameterSpec) -> FileForm | None:
        """Returns the present form of a parameter in files, or None if it is the form in the model.

        Args:
            site: The site.
            name: The rule's name of the parameter.
            spec: The rule's description of the parameter.
        """
        return spec.form

    def for_file(self, sites: Sequence[Any]) -> PeftConfig:
        """Returns the config to write for PEFT to read.

        Args:
            sites: The sites of the adapter, each with its rule.
        """
        return copy.deepcopy(self)

    def fitted_to(self, keys: Collection[str]) -> PeftConfig:
        """Returns the config that fits a file to be loaded.

        Args:
            keys: The names of the file's tensors.
        """
        return self

    def derived_tensors(self, site: Any, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns further tensors for a file, computed from a site's parameters, by their names in the file.

        Args:
            site: The site.
            parameters: The site's parameters, by the rule's names.
        """
        return {}

    def with_those_beside(
        self, tensors: Mapping[str, torch.Tensor], read: Callable[[str], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        """Returns the tensors of a file, with those that PEFT writes into a folder beside it.

        Args:
            tensors: The file's tensors, by their names.
            read: Reads the tensors of a file in a folder of this name, beside the file; raises FileNotFoundError if
                there is none.
        """
        return tensors

    def packed(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Returns the tensors that a file has for all tensors of the adapter, where several stand for one.

        Args:
            tensors: The adapter's tensors, by their names in the file.
        """
        return tensors

    def unpacked(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Returns the tensors of an adapter for those of a file, as `packed` was given them.

        Args:
            tensors: The file's tensors, by their names.

        Raises:
            ValueError: If they can't be those of an adapter.
        """
        return tensors

    def converted(
        self, tensors: Mapping[str, torch.Tensor], first: Mapping[str, torch.Tensor]
    ) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
        """Returns the config and the tensors of an equivalent adapter for the base's own weights, not residual ones.

        Args:
            tensors: The adapter's tensors, by their names in the file.
            first: The tensors of the untrained adapter, by the same names.
        """
        raise NotImplementedError(f"{type(self).__name__} takes a product from the weights, and can't convert it")

    def ignores(self, key: str) -> bool:
        """Returns whether a file may hold a tensor that the adapter doesn't need.

        Args:
            key: The tensor's name in the file.
        """
        return False

    def combined(self, configs: Sequence[Any], sites: Sequence[Any], how: Combination) -> PeftConfig:
        """Returns the config of an adapter that combines several adapters of this method.

        Args:
            configs: The configs of the combined adapters; `self` is the first.
            sites: The sites of all combined adapters.
            how: The options of the combination.

        Raises:
            ValueError: If the adapters can't be combined.
        """
        raise ValueError(f"{self.method} has no way to combine adapters")

    def combine(self, target: AdaptedSite, parts: Sequence[Part], how: Combination, count: int) -> Mapping[str, Any]:
        """Returns the tensors of a combined adapter at one site, by the rule's names.

        Args:
            target: The site with this config's rule.
            parts: The combined adapters that adapt the site, with their tensors there.
            how: The options of the combination.
            count: The number of all combined adapters.

        Raises:
            ValueError: If the adapters can't be combined.
        """
        raise NotImplementedError

    def resolved(self, model: nn.Module) -> PeftConfig:
        """Returns a copy of the config with all options that depend on the model filled in.

        Args:
            model: The model to adapt.
        """
        config = copy.deepcopy(self)
        if self.task_type is None or "modules_to_save" in self.lacks:
            return config
        trained = HEADS.get(self.task_type, ())
        heads = [name for name in trained if name not in (config.modules_to_save or ())]
        if heads:
            config.modules_to_save = [*(config.modules_to_save or ()), *heads]
        return config

    def __getattr__(self, name: str) -> Any:
        hint = hint_for_peft(config_class(self.method), name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{hint}", name=name, obj=self)

    def __deepcopy__(self, memo: dict[int, Any]) -> PeftConfig:
        made = object.__new__(type(self))
        memo[id(self)] = made
        for name, value in vars(self).items():
            vars(made)[name] = value if value is None or type(value) in ATOMS else copy.deepcopy(value, memo)
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Python's own would compare the type with the __class__
        return object.__new__, (type(self),), self.__dict__
