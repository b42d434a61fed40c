"""Slot names, under which graphs read the attributes of adapters: ``lora_A_slot0`` for ``lora_A_default``.

Each active adapter has a slot of the model, 0, 1, …, in the order of activation. Graphs and their source contain the
slot's number and not the adapter's name, so adapters of any names share graphs. A forward is compiled once with slot
names; replacing the names in its code object gives the forward for an adapter, which reads ``module.lora_A_default``
directly. Everything else that runs a graph, such as ``fx.Interpreter``, reads ``module.lora_A_slot0``, a property of
the module's class.
"""

from __future__ import annotations

import functools
import operator
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from graphpeft.graph import in_place

Names = tuple[tuple[int, str], ...]
"""Slots, each with the name of the adapter in it."""

_IN_SLOT = re.compile(r"(?P<stem>.+)_slot(?P<slot>[0-9]+)")


def in_slot(stem: str, slot: int) -> str:
    """Returns the name under which graphs read an adapter's attribute.

    Args:
        stem: The attribute's name without the adapter's name.
        slot: The adapter's slot.
    """
    return f"{stem}_slot{slot}"


def named(function: Callable[..., Any], names: Names) -> Callable[..., Any]:
    """Returns a copy of `function` that reads adapters' attributes by their own names instead of slot names."""
    if not names:
        return function
    adapters = dict(names)

    def own(constant: Any) -> Any:
        found = _IN_SLOT.fullmatch(constant) if isinstance(constant, str) else None
        adapter = adapters.get(int(found["slot"])) if found is not None else None
        return constant if found is None or adapter is None else f"{found['stem']}_{adapter}"

    code = function.__code__
    # an attribute name that is no identifier is an argument of getattr, and so a constant
    code = code.replace(co_names=tuple(map(own, code.co_names)), co_consts=tuple(map(own, code.co_consts)))
    copied = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    copied.__kwdefaults__, copied.__annotations__ = function.__kwdefaults__, function.__annotations__
    return copied


# on modules


def layer_for(names: Mapping[str, str]) -> in_place.Layer | None:
    """Returns the layer that gives a module attributes with slot names, or None if there are no names.

    Args:
        names: The attributes' own names, by their slot names.
    """
    return _layer(tuple(names.items())) if names else None


def read_in(module: nn.Module) -> Mapping[str, str]:
    """Returns the own names of a module's attributes that have slot names, by slot name."""
    return getattr(type(module), "_graphpeft_in_slots", {})


def slots_of(module: nn.Module) -> frozenset[int]:
    """Returns the slots for which a module has attributes with slot names."""
    return getattr(type(module), "_graphpeft_graph_slots_read", frozenset())


def slot_of(name: str) -> int:
    """Returns the slot in a slot name."""
    return int(name.rpartition("_slot")[2])


def names_like_slots(module: nn.Module) -> list[tuple[str, str]]:
    """Returns the module's own attributes whose names look like slot names, each with its stem."""
    own = (*module.__dict__, *module._parameters, *module._buffers, *module._modules)
    return _like_slots(in_place.original_class(module), own)


# cached, since equal modules have equal names
@functools.lru_cache(maxsize=256)
def _like_slots(cls: type, own: tuple[str, ...]) -> list[tuple[str, str]]:
    found = map(_IN_SLOT.fullmatch, (*own, *_of_class(cls)))
    return [(match[0], match["stem"]) for match in found if match is not None]


@functools.lru_cache(maxsize=256)
def _of_class(cls: type) -> tuple[str, ...]:
    return tuple(filter(_IN_SLOT.fullmatch, dir(cls)))


@functools.lru_cache(maxsize=1024)
def _layer(names: tuple[tuple[str, str], ...]) -> in_place.Layer:
    properties = {alias: property(operator.attrgetter(own)) for alias, own in names}
    read = {
        "_graphpeft_in_slots": dict(names),
        "_graphpeft_graph_slots_read": frozenset(slot_of(alias) for alias, _ in names),
    }
    return in_place.Layer("slots", (), properties | read, (_layer, (names,)))
