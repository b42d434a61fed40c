"""The state of a model's adapters: which there are, which act, and the model's own state before them."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphpeft.adapters import registrations
from graphpeft.adapters.plan import Plan
from graphpeft.adapters.replication import Replication
from graphpeft.graph import overrides
from graphpeft.graph.holders import all_parameters, name_at, tensor_at
from graphpeft.graph.paths import STATE
from graphpeft.graph.template import Template
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import Role, TargetOptions, options_for
from graphpeft.rules.plain_values import ATOMS
from graphpeft.rules.report import Report
from graphpeft.rules.rule import changes_bias
from graphpeft.sites.quantisers import Codes
from graphpeft.sites.regions import Lifted
from graphpeft.sites.site import LeafSite, Site
from graphpeft.targeting.full_training import TrainedRows
from graphpeft.transaction import set_attribute, undone_by

Modules = Mapping[str, nn.Module]
"""A model's modules by path."""

Tensors = dict[tuple[str, str], torch.Tensor]
"""Tensors by the path of their module and their name in it."""


def told_rows(table: nn.Module) -> int | None:
    """Returns how many rows a table says that it has, which may be fewer than its weight's; None if it says nothing."""
    count = getattr(table, "num_embeddings", None)
    return count if isinstance(count, int) else None


def options_of(config: PeftConfig) -> dict[str, Any]:
    """Returns copies of the options of a config that an adapter may be made with, by name."""
    names = type(config).__dataclass_fields__.keys() - {*options_for(PeftConfig, Role.EDITABLE)} - {"task_type"}
    return {
        name: value if value is None or type(value) in ATOMS else copy.deepcopy(value)
        for name, value in vars(config).items()
        if name in names
    }


def _of_site(config: PeftConfig, adapted: AdaptedSite) -> tuple[Any, ...] | None:
    """Returns the rule, the specs and the constants that a config gives a site; None if its options contradict."""
    try:
        config.check()
    except ValueError:
        return None
    rule: Any = config.rule_for(adapted.site, adapted.dtype).at_site(adapted.site, adapted.dtype)
    # each call makes functions of a form anew, and none equals another
    specs = {
        name: (spec._replace(form=None), spec.form and spec.form.shape)
        for name, spec in rule.parameters(adapted.site, config).items()
    }
    return rule, specs, rule.all_constants(adapted.site, config)


def _are_same_names(value: Any, other: Any) -> bool:
    """Returns whether an option has the same entries in another kind of container."""
    are_containers = isinstance(value, list | tuple | set) and isinstance(other, list | tuple | set)
    return are_containers and sorted(map(repr, value)) == sorted(map(repr, other))


@dataclass
class Adapter:
    """One adapter of a model; its tensors live on the modules whose weights they adapt.

    Attributes:
        config: Its config.
        sites: The sites that it adapts.
        fully_trained: The tensors for which it has overrides: names by the path of their module.
        report: A report of the sites, for a person to read.
        rows: The weights of which it has rows, by the path of their module.
        infixes: The parts of names in files behind the paths of modules that are fully trained.
        saved: The paths of the modules of `modules_to_save`, and of the modules inside of these.
        took_product: Whether it was made so that what its factors made at first was taken from the base's weights.
        overwritten: The model's own tensors before tensors of the adapter's file were put in their places.
        padded_to: The rank for which its factors have room, if compiled code is to run others in its place; 0 if they
            have none beside their own; else None.
        told_rows: How many rows the tables of `rows` said that they have when it came, by the path of their module.
        made_with: The options of its config as they were when it came.
    """

    config: PeftConfig
    sites: list[AdaptedSite]
    fully_trained: dict[str, tuple[str, ...]]
    report: Report
    rows: dict[str, TrainedRows] = field(default_factory=dict)
    infixes: dict[str, str] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    took_product: bool = False
    overwritten: Tensors = field(default_factory=dict)
    padded_to: int | None = None
    told_rows: dict[str, int] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan) -> Adapter:
        """Returns the adapter that `plan` describes."""
        return cls(
            plan.config,
            plan.sites,
            plan.fully_trained,
            plan.report,
            plan.rows,
            plan.infixes,
            plan.saved,
            plan.config.takes_product,
            told_rows={path: count for path in plan.rows if (count := told_rows(plan.modules[path])) is not None},
            made_with=options_of(plan.config),
        )

    @property
    def edited_options(self) -> dict[str, Any]:
        """The options that were set on the config since it was made, but not by training, with their former values."""
        now, by_training = vars(self.config), self.config.changed_by_training
        return {
            name: was
            for name, was in self.made_with.items()
            if name not in by_training and now[name] != was and not _are_same_names(now[name], was)
        }

    def idle(self, edited: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Returns the edited options by which a file's reader would get another model, each as it was and is."""
        now, made = vars(self.config), copy.copy(self.config)
        vars(made).update(edited)
        return {name: (was, now[name]) for name, was in edited.items() if self._is_idle(name, made)}

    def _is_idle(self, name: str, made: PeftConfig) -> bool:
        if name in TargetOptions._fields or name == made.option_for(Role.BIASES):
            return True
        # whoever loads the file makes these tensors by the config; of those that took a product, PEFT's recipe edits it
        remakes = any(not spec.is_saved for adapted in self.sites for spec in adapted.specs.values())
        if name not in made.editable and (remakes or (self.replaced and not self.took_product)):
            return True
        edited = copy.copy(made)
        vars(edited)[name] = vars(self.config)[name]
        # others are read as the model runs, or were read once and mean nothing any more
        return any((found := _of_site(edited, each)) is None or found != _of_site(made, each) for each in self.sites)

    @functools.cached_property
    def call_inputs(self) -> frozenset[str]:
        """The arguments that its rules read in each call."""
        return frozenset(itertools.chain.from_iterable(adapted.rule.call_inputs for adapted in self.sites))

    @property
    def changes_weights(self) -> bool:
        """Whether it can be merged into weights."""
        return all(adapted.unmergeable is None for adapted in self.sites)

    @property
    def is_change_of_weights(self) -> bool:
        """Whether sums with weights are all that it does: it changes no biases, and reads no other weights in place."""
        changes_biases = self.config.trained_biases != "none" or any(changes_bias(a.rule) for a in self.sites)
        rounds = any(adapted.rule.rounds_sum for adapted in self.sites)
        does_more = changes_biases or rounds or self.took_product or bool(self.replaced)
        return bool(self.sites) and self.changes_weights and not does_more

    @property
    def weight_sites(self) -> list[Any]:
        """The sites that are weights."""
        return [adapted for adapted in self.sites if isinstance(adapted.site, Site)]

    @functools.cached_property
    def apart(self) -> list[Any]:
        """The sites that are weights of modules that have no graph with the adapter's nodes."""
        return [
            a for a in self.weight_sites if not a.site.is_called and (a.site.region != a.site.owner or a.site.own_code)
        ]

    @property
    def coded_sites(self) -> list[Any]:
        """The sites that are calls of layers into whose quantised weights it can be merged."""
        return [a for a in self.sites if isinstance(a.site, LeafSite) and a.unmergeable is None]

    @property
    def replaced(self) -> dict[str, tuple[str, ...]]:
        """The tensors for which it has frozen overrides: names by the path of their module."""
        found: dict[str, tuple[str, ...]] = {}
        for adapted in self.sites:
            if adapted.replaced:
                found[adapted.site.owner] = (*found.get(adapted.site.owner, ()), *adapted.replaced)
        return found

    @property
    def overrides(self) -> dict[str, tuple[str, ...]]:
        """The tensors for which it has overrides of either kind."""
        found = dict(self.fully_trained)
        for path, names in self.replaced.items():
            found[path] = (*found.get(path, ()), *names)
        return found

    def reading(self, path: str, adapter: str) -> Callable[[nn.Module], dict[str, torch.Tensor]]:
        """Returns a function that tells what a module reads in place of its own tensors while this adapter acts."""
        names, rows = self.overrides.get(path, ()), self.rows.get(path)

        def read(module: nn.Module) -> dict[str, torch.Tensor]:
            tensors = {own: tensor_at(module, overrides.override_name(own, adapter)) for own in names}
            if rows is None:
                return tensors
            table, values = (overrides.own_parameter(module, own) for own in ("weight", overrides.rows(adapter)))
            return tensors | {"weight": overrides.put_rows(table, rows.indices, values)}

        return read

    def frozen_names(self, adapter: str) -> set[tuple[str, str]]:
        """Returns the module's path and the name of each tensor of this adapter that isn't trained now."""
        frozen = self._untrained | self.replacing_names(adapter)
        if type(self.config).rests is PeftConfig.rests:  # most methods let none rest
            return frozen
        return frozen | {
            (adapted.site.owner, adapted.names[name])
            for adapted in self.sites
            for name in adapted.specs
            if self.config.rests(adapted.site, name)
        }

    def replacing_names(self, adapter: str) -> set[tuple[str, str]]:
        """Returns the module's path and the name of each tensor that is read in place of a weight."""
        return {
            (path, overrides.override_name(name, adapter)) for path, names in self.replaced.items() for name in names
        }

    def roots(self, adapter: str) -> list[tuple[str, str]]:
        """Returns the places of the adapter's holders, and of tensors that are in none: a module's path, and a name."""
        groups = [(adapted.site.owner, adapted.rule.held_in) for adapted in self.sites]
        names = {group: name_at(adapter, "", group) for group in {group for _, group in groups}}
        found = [(owner, names[group]) for owner, group in groups]
        found += [(path, name_at(adapter, "")) for path in self.overrides]
        return list(dict.fromkeys([*found, *((path, overrides.rows(adapter)) for path in self.rows)]))

    def tensor_names(self, adapter: str) -> list[tuple[str, str]]:
        """Returns the module's path and the name of every tensor of this adapter."""
        found = list(self._at_sites)
        for path, names in self.overrides.items():
            found += [(path, overrides.override_name(name, adapter)) for name in names]
        return found + [(path, overrides.rows(adapter)) for path in self.rows]

    def exchange_sites(self, sites: Sequence[AdaptedSite]) -> None:
        """Exchanges the sites for others of the same weights, with tensors of the same names; inside a transaction."""
        undone_by(self._set_sites, list(self.sites))
        self._set_sites(sites)

    def _set_sites(self, sites: Sequence[AdaptedSite]) -> None:
        self.sites[:] = sites
        vars(self).pop("apart", None)  # has the sites as they were

    # other sites have tensors of the same names
    @functools.cached_property
    def _at_sites(self) -> list[tuple[str, str]]:
        """The module's path and the name of each tensor at its sites."""
        return [(adapted.site.owner, adapted.names[name]) for adapted in self.sites for name in adapted.specs]

    @functools.cached_property
    def _untrained(self) -> set[tuple[str, str]]:
        """The module's path and the name of each tensor at its sites that is never trained."""
        return {
            (adapted.site.owner, adapted.names[name])
            for adapted in self.sites
            for name, spec in adapted.specs.items()
            if not spec.is_trained
        }

    @functools.cached_property
    def modules_changed(self) -> frozenset[str]:
        """The paths of the modules that it changes: of its weights, and of the graphs that have its nodes."""
        return frozenset([path for adapted in self.sites for path in (adapted.site.owner, adapted.site.region)])

    @functools.cached_property
    def owners(self) -> list[str]:
        """The paths of the modules that have its tensors, each once."""
        of_sites = [adapted.site.owner for adapted in self.sites if adapted.specs]
        return list(dict.fromkeys((*of_sites, *self.overrides, *self.rows)))


class Cache(dict[Any, Any]):
    """Values that can be worked out again, and are of no use to a copy or a pickle: it begins empty there."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, ()


@dataclass
class Adapters:
    """All adapters of a model.

    Attributes:
        by_name: The adapters.
        active: The names of those that act unless they are disabled, in the order in which they were activated.
        slots: The slots of those whose nodes are in the graphs, in their order: of the active ones that aren't merged,
            or of none.
        read: The names of those whose overrides are read: the active ones, or none.
        trainable: The names of those whose tensors require grad: the active ones, and others that were loaded to be
            trained.
        is_disabled: Whether none acts, whichever are active, until they are enabled again.
        pauses: An object for each context in which none acts, until it is left.
        lifted: The regions that were no graph modules before, as they were then, by path.
        found: The sites of weights as they were found, by the path of the weight's module and the weight's name there.
        merged: The names of those whose changes are in the weights, in the order in which they were added.
        originals: The weights without any of these changes.
        merged_bits: Fingerprints of the tensors of each of these as they were when it was merged, by its name.
        codes: The quantised weights without any of these changes, by the path of their module.
        mixing: How regions run on a batch with several adapters, by what these have in common.
        signatures: The part of each adapter that others may have in common with it in that, by its name.
        mixable: The paths of the regions that can run so.
        asking: The tensors whose readers ask for the rows of a batch, by the path of their module.
        call_inputs: The arguments that adapters read in each call of the model, by name, with whether its forward takes
            them, too.
        positional: The names of the forward's arguments in their order, if there are any such.
        passes: Returns the template that a region wears for its plain one; None where it wears that itself.
        trained_before: The parameters that required grad before the first adapter came, by the path of their module and
            their name.
        has_penalties: Whether an adapter has come whose method adds something to the loss.
        replication: How the model's layers were exchanged for an adapter.
        places: Where each module with an adapter that acts was last seen.
    """

    trained_before: list[tuple[str, str]]
    by_name: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    lifted: dict[str, Lifted] = field(default_factory=dict)
    found: dict[tuple[str, str], Site] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    trainable: frozenset[str] = frozenset()
    merged: list[str] = field(default_factory=list)
    originals: Tensors = field(default_factory=dict)
    merged_bits: dict[str, Any] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    mixing: Cache = field(default_factory=Cache)
    signatures: Cache = field(default_factory=Cache)
    mixable: set[str] = field(default_factory=set)
    asking: dict[str, tuple[str, ...]] = field(default_factory=dict)
    is_disabled: bool = False
    pauses: frozenset[object] = frozenset()
    has_penalties: bool = False
    replication: Replication | None = None
    passes: Callable[[Template, nn.Module], Template] | None = None
    call_inputs: Mapping[str, bool] = field(default_factory=dict)
    positional: tuple[str, ...] = ()
    places: Cache = field(default_factory=Cache)

    def __post_init__(self) -> None:
        registrations.watch()

    def note_call_inputs(self, model: nn.Module) -> None:
        """Finds out what `call_inputs` and `positional` are for the adapters that there are now."""
        names = {name for adapter in self.by_name.values() for name in adapter.call_inputs}
        taken = inspect.signature(model.forward).parameters if names else {}
        set_attribute(self, "call_inputs", {name: name in taken for name in names})
        set_attribute(self, "positional", tuple(taken))

    @property
    def acting(self) -> list[str]:
        """The names of those whose nodes are in the graphs."""
        return list(self.slots)

    def slots_by_module(self) -> dict[str, set[int]]:
        """Returns the slots of those whose nodes are in the graphs, by the paths of the modules that they change.

        At other modules, adapters of a model around or inside may have the same slots.
        """
        found: dict[str, set[int]] = {}
        for name, slot in self.slots.items():
            for path in self.by_name[name].modules_changed:
                found.setdefault(path, set()).add(slot)
        return found

    @classmethod
    def before_any(cls, modules: Modules) -> Adapters:
        """Returns the adapters of a model that has none yet."""
        trained = [
            (path, name)
            for path, module in modules.items()
            for name, parameter in all_parameters(module)
            if parameter.requires_grad
        ]
        return cls(trained)

    @property
    def are_off(self) -> bool:
        """Whether none acts now, whichever are active."""
        return self.is_disabled or bool(self.pauses)

    def __getstate__(self) -> dict[str, Any]:
        # a copy is never left by the contexts in which it was made
        return {**self.__dict__, "is_disabled": self.are_off, "pauses": frozenset()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        registrations.watch()
        vars(self).update(state)


def adapters_of(model: nn.Module) -> Adapters | None:
    """Returns a model's adapters; None if it was never adapted, or is unloaded."""
    return model.__dict__.get(STATE)
