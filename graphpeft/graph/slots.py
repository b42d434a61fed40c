"""Slot names, under which graphs read the tensors of adapters: ``slot0.lora_A`` for ``default.lora_A``.

Each active adapter has a slot of the model, 0, 1, …, in the order of activation. Graphs and their source contain the
slot's number and not the adapter's name, so adapters of any names share graphs. A forward is compiled once with slot
names; replacing the names in its code object gives the forward for an adapter, which reads ``module.default.lora_A``
directly. Everything else that runs a graph, such as ``fx.Interpreter``, reads ``module.slot0``, a property of the
module's class that returns the adapter's holder. In a group of holders, ``prompts.slot0`` is the holder in the slot.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from graphpeft.graph import in_place
from graphpeft.graph.holders import HolderGroup, name_at, own_modules
from graphpeft.transaction import delete_item, set_item

Names = tuple[tuple[int, str], ...]
"""Slots, each with the name of the adapter in it."""

_SLOT = re.compile(r"slot[0-9]+")
_IN_SLOT = re.compile(r"(^|\.)slot[0-9]+\.")


def in_slot(name: str, slot: int, group: str = "") -> str:
    """Returns the name under which graphs read the attribute `name` of the holder of the adapter in a slot."""
    return name_at(_holder(slot), name, group)


def _holder(slot: int) -> str:
    return f"slot{slot}"


def without_slot(path: str) -> str:
    """Returns the name in its holder of what graphs read at a path; of anything else, the last part of the path."""
    found = _IN_SLOT.search(path)
    return path.rpartition(".")[2] if found is None else path[found.end() :]


def named(function: Callable[..., Any], names: Names) -> Callable[..., Any]:
    """Returns a copy of `function` that reads adapters' attributes by their own names instead of slot names."""
    if not names:
        return function
    adapters = {_holder(slot): adapter for slot, adapter in names}
    code = function.__code__
    code = code.replace(co_names=tuple(adapters.get(name, name) for name in code.co_names))
    copied = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    copied.__kwdefaults__, copied.__annotations__ = function.__kwdefaults__, function.__annotations__
    return copied


# on modules


def layer_for(names: Mapping[int, str]) -> in_place.Layer | None:
    """Returns the layer that gives a module its holders by slot names, or None if there are none."""
    return _layer(tuple(names.items())) if names else None


def read_in(module: nn.Module) -> Mapping[int, str]:
    """Returns the adapters whose holders a module has by slot names, by slot."""
    return getattr(type(module), "_graphpeft_in_slots", {})


def read_in_group(group: HolderGroup, names: Mapping[int, str], left: Collection[int]) -> None:
    """Lets graphs read the holders in a group by slot names."""
    for slot in left:
        delete_item(group.in_slots, _holder(slot))
    for slot, adapter in names.items():
        set_item(group.in_slots, _holder(slot), adapter)


def names_like_slots(module: nn.Module) -> list[str]:
    """Returns the module's own attributes whose names look like slot names."""
    own = (*module.__dict__, *module._parameters, *module._buffers, *dict(own_modules(module)))
    return _like_slots(in_place.original_class(module), own)


# cached, since equal modules have equal names
@functools.lru_cache(maxsize=256)
def _like_slots(cls: type, own: tuple[str, ...]) -> list[str]:
    return [name for name in (*own, *dir(cls)) if _SLOT.fullmatch(name)]


def _reading(adapter: str) -> Callable[[nn.Module], nn.Module | None]:
    # which costs a quarter of what reading the attribute does
    return lambda module: module._modules[adapter]


@functools.lru_cache(maxsize=1024)
def _layer(names: Names) -> in_place.Layer:
    properties = {_holder(slot): property(_reading(adapter)) for slot, adapter in names}
    return in_place.Layer("slots", (), properties | {"_graphpeft_in_slots": dict(names)}, (_layer, (names,)))
