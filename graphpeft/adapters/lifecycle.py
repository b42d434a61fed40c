"""Adapters on a model: add one, choose which act, take one off.

All functions here run inside a transaction, which takes their changes back if they fail.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.acting import let_act, override_readers
from graphpeft.adapters.exchanged import refuse_exchanged
from graphpeft.adapters.graphs import without_any
from graphpeft.adapters.merging import unmerge, with_originals
from graphpeft.adapters.plan import AdaptError, Plan
from graphpeft.adapters.reads import READS
from graphpeft.adapters.state import Adapter, Adapters, Modules, Tensors, adapters_of
from graphpeft.adapters.tensors import new_tensors, overwrite
from graphpeft.adapters.trainable import thaw
from graphpeft.graph import in_place, overrides, slots
from graphpeft.graph.autocast import in_own_precision
from graphpeft.graph.hidden_holders import hide_holders, stop_hiding
from graphpeft.graph.holders import (
    HOLDERS,
    HolderGroup,
    has_tensor,
    holder_for,
    new_place,
    place_of,
    put_on,
    take_off,
    tensor_at,
)
from graphpeft.graph.hosts.patched_code import holds_own_tensor
from graphpeft.graph.hosts.patched_forwards import forget, know
from graphpeft.graph.hosts.sharding import is_managed
from graphpeft.graph.hosts.tensor_parallel import refusal
from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.paths import STATE, join, modules_by_path
from graphpeft.graph.template import GraphForward, names_in_slots, template_of
from graphpeft.graph.values import replace, written
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.parameter_spec import Dropout
from graphpeft.rules.short_options import short_options
from graphpeft.sites.regions import Lifted
from graphpeft.transaction import (
    at_end_of,
    delete_item,
    remember,
    set_attribute,
    set_item,
    set_items,
    transaction,
)
from graphpeft.wording import joined


def add(modules: Modules, adapters: Adapters, name: str, plan: Plan, values: Tensors | None = None) -> None:
    """Puts the adapter of `plan` on a model, inactive; its tensors require grad unless it is for inference."""
    as_unmerged = with_originals(modules, adapters) if adapters.merged else in_own_precision(modules)
    with as_unmerged, torch.inference_mode(False):  # whose tensors could never be trained
        made = new_tensors(plan, name, modules, values)
    constants = {
        (adapted.site.owner, adapted.names[constant]): value
        for adapted in plan.sites
        for constant, value in adapted.constants.items()
    }
    adapter = Adapter.of(plan)
    owners = dict.fromkeys([path for path, _ in (*made, *constants)])
    roots = [(path, root) for path, root in adapter.roots(name) if path in owners]
    for path, root in roots:
        _refuse_taken(modules[path], path, root)
    for path in owners:
        reason = refusal(modules[path])
        if reason is not None:
            raise AdaptError(f"{path or 'the model'} can't be adapted: {reason}; leave it out of the config")
        if not plan.config.inference_mode:
            _refuse_unmanaged(modules[path], path, name)
    for path in {*plan.fully_trained, *plan.rows, *(each.site.owner for each in plan.sites if each.replaced)}:
        if holds_own_tensor(modules[path]):
            raise AdaptError(
                f"the forward that was set on {path or 'the model'} itself has a tensor of it in hand, and would not "
                f"see that of adapter {name!r} in its place; let it read the tensor from the module in each call"
            )
    method, options = plan.config.method.lower(), short_options(plan.config)
    for path, root in roots:
        # what is a tensor itself is in groups alone
        holder = None if (path, root) in made else holder_for(modules[path], method, options)
        put_on(modules[path], root, holder)
        hide_holders(modules[path])
    for (path, attribute), tensor in made.items():
        holder, own = new_place(modules[path], attribute)
        held: dict[str, Any] = holder._parameters if isinstance(tensor, nn.Parameter) else holder._buffers
        if isinstance(holder, HolderGroup):
            set_item(held, own, tensor)
        else:
            held[own] = tensor  # the holder is new, and goes with all that is in it
    for (path, attribute), value in constants.items():
        if type(value) is Dropout:
            holder, own = new_place(modules[path], attribute.removesuffix(".p"))
            holder._modules[own] = nn.Dropout(value).train(holder.training)
        else:
            holder, own = new_place(modules[path], attribute)
            vars(holder)[own] = value
    if not plan.config.inference_mode:
        set_attribute(adapters, "trainable", adapters.trainable | {name})
    lifted = {
        region: Lifted(without_any(template), modules[region], in_place.original_class(modules[region]))
        for region, template in plan.templates.items()
        if (region not in adapters.lifted or region in plan.renewed)
        and (template.shared or template_of(modules[region]) is None)
    }
    set_items(adapters.lifted, lifted)
    if plan.renewed:
        for place in [place for place, site in adapters.found.items() if site.region in plan.renewed]:
            delete_item(adapters.found, place)
    set_items(adapters.found, plan.found)
    for region in lifted:
        if region:  # that of the model itself asks in each call which adapters act, see `patched_forwards.py`
            know(modules[region])
    set_item(adapters.by_name, name, adapter)
    adapters.note_call_inputs(modules[""])
    own = {place: value for place, value in (values or {}).items() if place not in made}
    if own:
        overwrite(modules, adapter, name, own)


def _refuse_taken(module: nn.Module, path: str, root: str) -> None:
    where = path or "the model"
    for attribute in slots.names_like_slots(module):
        raise AdaptError(f"{where} has an attribute {attribute!r}, which graphs read for adapters; rename it")
    *groups, name = root.split(".")
    around = module
    for group in groups:
        inner = around._modules.get(group)
        if not isinstance(inner, HolderGroup):
            # what an adapted model has under PEFT's name isn't its own
            if _has(around, in_place.original_class(around), group):
                raise AdaptError(
                    f"{where} has an attribute {group!r} already, where the adapter's tensors are to be; rename it"
                )
            around = HolderGroup()
            break
        around = inner
    if _has(around, type(around), name) or name in _OF_GRAPHS:
        where = join(path, ".".join(groups)) or where
        raise AdaptError(f"{where} has an attribute {name!r} already; choose another adapter name")


def _has(module: nn.Module, cls: type, name: str) -> bool:
    # hasattr of the module itself takes its time where there is none
    is_held = name in module.__dict__ or name in module._parameters or name in module._buffers
    return is_held or name in module._modules or hasattr(cls, name)


def _refuse_unmanaged(module: nn.Module, path: str, name: str) -> None:
    """Raises AdaptError if a module was sharded before it got tensors that are to be trained."""
    if is_managed(module):
        raise AdaptError(
            f"{path or 'the model'} was sharded before adapter {name!r} came, whose gradients would differ among the "
            "processes; adapt the model before you shard it, or load the adapter for inference "
            "(is_trainable=False), in which it needs no gradients"
        )


_OF_GRAPHS = frozenset(dir(GraphForward))
"""Attributes that a module with a graph has."""


def forget_mixing(adapters: Adapters) -> None:
    """Forgets how regions run on a mixed batch, since other modules or graphs may be there."""
    adapters.mixing.clear()
    adapters.signatures.clear()


def activate(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Makes exactly the adapters `names` act, now or when they are no longer disabled."""
    wanted = list(dict.fromkeys(names))
    override_readers(adapters, wanted)
    _refuse_apart(adapters, wanted)
    if wanted != adapters.active:
        unmerge_first(modules, adapters, stacklevel=4)
    let_act(modules, adapters, [] if adapters.are_off else wanted)
    set_attribute(adapters, "active", wanted)


def _refuse_apart(adapters: Adapters, names: list[str]) -> None:
    """Raises AdaptError if one of some adapters can't act together with the others."""
    for name in names:
        config = adapters.by_name[name].config
        reason = config.apart_from({other: adapters.by_name[other].config for other in names if other != name})
        if reason is not None:
            raise AdaptError(
                f"{name!r}, of {config.method}, can't act beside another adapter: {reason}; activate one of them alone"
            )


def disable(modules: Modules, adapters: Adapters, is_disabled: bool) -> None:
    """Lets no adapter act until this is called again, or ends that; what is merged is unmerged first."""
    set_attribute(adapters, "is_disabled", is_disabled)
    _turn(modules, adapters)


def _turn(modules: Modules, adapters: Adapters) -> None:
    """Lets the active adapters act, or none, as the state says."""
    if adapters.are_off:
        unmerge(modules, adapters)
    let_act(modules, adapters, [] if adapters.are_off else adapters.active)
    for name in adapters.active:
        refuse_exchanged(
            modules, adapters.by_name[name].tensor_names(name), name
        )  # even if none acts: they are to act again


class Paused(contextlib.ExitStack):
    """A context in which no adapter of a model acts. Several can overlap; adapters act again when the last is left."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def __enter__(self) -> Any:
        state = adapters_of(self._model)
        assert state is not None
        pause = object()
        at_end_of(self, _leave, self._model, state, pause)
        try:
            with transaction(self._model):
                set_attribute(state, "pauses", state.pauses | {pause})
                _turn(_modules_of(self._model), state)
            return self
        except BaseException:
            self.close()
            raise


def _leave(model: nn.Module, state: Adapters, pause: object) -> None:
    if pause not in state.pauses or adapters_of(model) is not state:
        return
    try:
        with transaction(model):
            set_attribute(state, "pauses", state.pauses - {pause})
            _turn(_modules_of(model), state)
    except AdaptError:
        # nobody can leave the context again, so they remain disabled until somebody has mended that and enables them
        with transaction(model):
            set_attribute(state, "pauses", state.pauses - {pause})
            set_attribute(state, "is_disabled", True)
        raise


def _modules_of(model: nn.Module) -> Modules:
    return modules_by_path(model)


def unmerge_first(modules: Modules, adapters: Adapters, stacklevel: int = 3) -> None:
    """Unmerges all merged adapters, with a warning."""
    if adapters.merged:
        text = f"{joined(adapters.merged)} are merged, and are unmerged first"
        warnings.warn(text, PeftWarning, stacklevel=stacklevel)
        unmerge(modules, adapters)


def remove(modules: Modules, adapters: Adapters, name: str) -> None:
    """Takes an adapter, which isn't merged, and its tensors off the model."""
    left = [other for other in adapters.active if other != name]
    let_act(modules, adapters, [] if adapters.are_off else left)
    set_attribute(adapters, "active", left)
    adapter = adapters.by_name[name]
    if adapter.overwritten:
        unmerge_first(modules, adapters, stacklevel=4)  # or their originals would bring back what was replaced
    delete_item(adapters.by_name, name)
    set_attribute(adapters, "trainable", adapters.trainable - {name})
    adapters.note_call_inputs(modules[""])
    forget_mixing(adapters)
    for path, root in adapter.roots(name):
        # somebody may have put another module in the place of an adapted one
        if path in modules:
            take_off(modules[path], root)
            stop_hiding(modules[path])
            if hasattr(type(modules[path]), READS) and HOLDERS not in vars(modules[path]):
                in_place.take_off(modules[path], "reads")
    _forget_regions(modules, adapters, adapter)
    if adapters.asking:
        there = {path for other in adapters.by_name.values() for path in other.owners}
        for path in adapters.asking.keys() - there:
            delete_item(adapters.asking, path)
    for (path, attribute), tensor in adapter.overwritten.items():
        if path in modules and modules[path]._parameters.get(attribute) is not None:
            with written(modules[path]):
                held = own_parameter(modules[path], attribute)
                remember(held)
                with torch.no_grad():
                    held.copy_(tensor)


def _forget_regions(modules: Modules, adapters: Adapters, gone: Adapter) -> None:
    """Forgets the graphs of regions that have no adapter any more: their modules may be others by the next one."""
    used = {adapted.site.region for other in adapters.by_name.values() for adapted in other.sites}
    left = {adapted.site.region for adapted in gone.sites} - used
    for region in left & adapters.mixable & modules.keys():
        in_place.take_off(modules[region], "rows")
    set_attribute(adapters, "mixable", adapters.mixable - left)
    for region in left & adapters.lifted.keys():
        if region not in modules or template_of(modules[region]) is None:  # nobody has edited the graph
            delete_item(adapters.lifted, region)
            if region in modules:
                forget(modules[region])
    for place in [place for place, site in adapters.found.items() if site.region in left]:
        delete_item(adapters.found, place)


def copies_of_saved(modules: Modules, adapters: Adapters) -> Tensors:
    """Returns the active adapters' copies of `modules_to_save`, by the places of the originals."""
    found: Tensors = {}
    for name in adapters.active:
        adapter = adapters.by_name[name]
        for path in adapter.saved:
            for own in adapter.fully_trained[path]:
                trained = overrides.override_name(own, name)
                # not of a module or a tensor that somebody has put there since
                if path in modules and all(has_tensor(modules[path], each) for each in (own, trained)):
                    found[path, own] = tensor_at(modules[path], trained)
    return found


def unload(model: nn.Module, adapters: Adapters, left: Tensors) -> None:
    """Takes all adapters and the methods of `PeftModel` off a model, and gives it tensors in place of its own."""
    modules = _modules_of(model)
    with transaction(model):
        unmerge(modules, adapters)
        activate(modules, adapters, [])  # none needs to act in a module that was replaced
        for name in list(adapters.by_name):
            remove(modules, adapters, name)
        for region in adapters.mixable & modules.keys():
            in_place.take_off(modules[region], "rows")
        for region in adapters.lifted.keys() & modules.keys():
            if not names_in_slots(modules[region]):  # of adapters of a model inside or around
                in_place.take_off(modules[region], "graph")
                forget(modules[region])
        delete_item(model.__dict__, STATE)
        in_place.exchange(model, {"methods": None, "peft": None})
        for (path, own), tensor in left.items():
            replace(modules[path], own, tensor)
        thaw(modules, adapters)
        if adapters.replication is not None:
            adapters.replication.undo()


def refuse_untrainable(modules: Modules, adapter: Adapter, name: str) -> None:
    """Raises AdaptError if an adapter that was loaded for inference asks for what can't be done in training."""
    managed = {path for path in adapter.owners if path in modules and is_managed(modules[path])}
    for path, own in adapter.tensor_names(name) if managed else ():
        if path in managed and has_tensor(modules[path], own) and not is_managed(place_of(modules[path], own)[0]):
            _refuse_unmanaged(modules[path], path, name)
    config = copy.copy(adapter.config)
    config.inference_mode = False
    for adapted in adapter.sites:
        reason = adapted.rule.check(adapted.site, config)
        if reason is not None:
            raise AdaptError(
                f"adapter {name!r} was loaded for inference and can't be trained: {adapted.site.label}: {reason} in "
                "the config that you load it with, or call set_adapter with inference_mode=True"
            )
