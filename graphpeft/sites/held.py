"""What modules hold otherwise than by registering it, by which they may read weights of others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft._torch import FORWARD_HOOKS_OF_ALL
from graphpeft.code.attribute_paths import ANY
from graphpeft.code.contents import CONTAINERS, PLAIN, parts_of
from graphpeft.code.reach import functions_held, opened
from graphpeft.code.source import functions_called, names_in, read_by, uses_in_forward
from graphpeft.graph import in_place

_OF_EACH_MODULE = frozenset(vars(nn.Module()))
"""Attributes of every module: its parameters, its submodules, its hooks."""

_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hooks" in name)

_LEADING_NOWHERE = PLAIN - {nn.Parameter}
"""Types of values that hold no module and no parameter."""


def held_by(module: nn.Module) -> dict[str, Any]:
    """Returns what a module has in attributes of its own, unless it leads to no module, parameter or function."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _OF_EACH_MODULE and not (type(value) in _LEADING_NOWHERE or _holds_plain_values(value))
    }


def _holds_plain_values(value: Any) -> bool:
    """Returns whether a value is a container from which nothing leads further."""
    kind = type(value)
    if kind is dict:
        return _LEADING_NOWHERE.issuperset(map(type, value.values()))
    return kind in (list, tuple, set, frozenset) and _LEADING_NOWHERE.issuperset(map(type, value))


def is_of_pytorch(module: nn.Module) -> bool:
    """Returns whether the class of a module is PyTorch's."""
    return type(module).__module__.startswith("torch.nn.modules.")


def read_through(module: nn.Module, held: Mapping[str, Any]) -> set[str]:
    """Returns the names of attributes that a module may read by what it holds, and by hooks; `ANY` if it may be any."""
    may_run = has_hooks(module) or any(map(_may_lead_to_functions, held.values()))
    names = _read_by_functions(module) if may_run else set[str]()
    return names | {ANY} if _has_parameters(held.values()) else names


def has_hooks(module: nn.Module) -> bool:
    """Returns whether functions run with the forward of a module, or of each module."""
    return any(map(vars(module).get, _HOOKS)) or any(FORWARD_HOOKS_OF_ALL)


def _read_by_functions(module: nn.Module) -> set[str]:
    """Returns the names of attributes that the functions which a module holds read from whatever they are given."""
    return set().union(*map(read_by, functions_called(functions_held(module)))) - {ANY}


def _may_lead_to_functions(value: Any) -> bool:
    return callable(value) or issubclass(type(value), (*CONTAINERS, tuple))


def _has_parameters(held: Iterable[Any]) -> bool:
    """Returns whether there are parameters in lists and the like, or closures, by which one may read others'."""
    waiting = [*held]
    while waiting:
        value = waiting.pop()
        if issubclass(type(value), dict | list | tuple):
            waiting += parts_of(value)
        elif issubclass(type(value), nn.Parameter) or (type(value) is FunctionType and value.__closure__):
            return True
    return False


class Holding(NamedTuple):
    """What holds a module or a parameter otherwise than by registering it.

    Attributes:
        path: The path of the module that holds it.
        name: The attribute in which it does, whether by itself, in a container, an object or a function.
    """

    path: str
    name: str


def held_outside(
    modules: Mapping[str, nn.Module], held: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, str], list[Holding]]:
    """Returns, by owner and name, what holds weights that its code may read where no path of modules leads to them.

    Args:
        modules: The model's modules by path.
        held: What some of them hold beside modules, parameters and plain values, by path.
    """
    known: dict[int, list[_Held]] = {}
    holdings = []
    for path, of_module in held.items():
        if not of_module or is_of_pytorch(modules[path]):
            continue
        for name, value in of_module.items():
            # many modules hold one config
            if id(value) not in known:
                known[id(value)] = list(_reached_from(value))
            holdings += [(path, name, inner, codes) for inner, codes in known[id(value)]]
    if not holdings:
        return {}  # as in nearly all models
    places = {
        id(weight): (path, name)
        for path, module in modules.items()
        for name, weight in module._parameters.items()
        if weight is not None
    }
    found: dict[tuple[str, str], list[Holding]] = {}
    for path, name, inner, codes in holdings:
        for weight in inner.parameters() if isinstance(inner, nn.Module) else (inner,):
            place = places.get(id(weight))
            if place is not None and place[0] != path and _reads(modules[path], name, inner, codes, place[1]):
                found.setdefault(place, []).append(Holding(path, name))
    return found


_Held = tuple[Any, frozenset[CodeType]]
"""A module or a parameter, with the code that leads to it."""


def _reached_from(start: Any) -> Iterator[_Held]:
    waiting: list[_Held] = [(start, frozenset())]
    seen: dict[int, Any] = {}
    while waiting:
        value, codes = waiting.pop()
        kind = type(value)  # isinstance asks an object of a user's for its __class__
        if issubclass(kind, nn.Module | nn.Parameter):
            yield value, codes
        elif id(value) not in seen and not issubclass(kind, torch.Tensor | type):
            seen[id(value)] = value
            codes |= {value.__code__} if kind is FunctionType else _codes_of(kind)
            waiting += [
                (part, codes)
                for part in opened(value)[1]
                if type(part) not in _LEADING_NOWHERE and not _holds_plain_values(part)
            ]


def _codes_of(cls: type) -> frozenset[CodeType]:
    return frozenset(member.__code__ for member in vars(cls).values() if type(member) is FunctionType)


def _reads(module: nn.Module, name: str, held: Any, codes: frozenset[CodeType], attribute: str) -> bool:
    """Returns whether the code of a module, or that by which it holds another, may read its parameter `attribute`."""
    if isinstance(held, nn.Parameter) or any(attribute in names_in(code).read for code in codes):
        return True
    uses = uses_in_forward(in_place.original_class(module))
    elsewhere = uses.read_elsewhere | _read_by_functions(module)
    if not elsewhere.isdisjoint((attribute, ANY)):
        return True
    return any(path.startswith(f"{name}.") and path.endswith(f".{attribute}") for path in uses.read)
