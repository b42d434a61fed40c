"""Objects that modules hold without registering them, through which they may read weights of other modules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft._torch import FORWARD_HOOKS_OF_ALL
from graphpeft.code.attribute_paths import ANY, paths_in
from graphpeft.code.contents import CONTAINERS, PLAIN, parts_of
from graphpeft.code.reach import functions_held, functions_run, opened
from graphpeft.code.source import functions_called, functions_in_forward, names_in, read_by, uses_in_forward
from graphpeft.graph.forward_classes import class_of_forward
from graphpeft.graph.kept_forwards import KNOWN, OF_HOOKS

_OF_EACH_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has, such as parameters, submodules and hooks."""

_NOT_HELD = _OF_EACH_MODULE | OF_HOOKS | {KNOWN}

_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hooks" in name)

_PLAIN_TYPES = PLAIN - {nn.Parameter}
"""Types whose values hold no module and no parameter."""


def held_by(module: nn.Module) -> dict[str, Any]:
    """Returns a module's own attributes, by name, that may lead to a module, a parameter or a function."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _NOT_HELD and not (type(value) in _PLAIN_TYPES or _holds_plain_values(value))
    }


def _holds_plain_values(value: Any) -> bool:
    """Returns whether a value is a container of plain values only."""
    kind = type(value)
    if kind is dict:
        return _PLAIN_TYPES.issuperset(map(type, value.values()))
    return kind in (list, tuple, set, frozenset) and _PLAIN_TYPES.issuperset(map(type, value))


def is_of_pytorch(module: nn.Module) -> bool:
    """Returns whether the class of a module is PyTorch's."""
    return type(module).__module__.startswith("torch.nn.modules.")


def read_through(module: nn.Module, held: Mapping[str, Any]) -> set[str]:
    """Returns the attribute names that held objects and hooks of a module may read; includes `ANY` if it may be any."""
    may_run = has_hooks(module) or any(map(_may_lead_to_functions, held.values()))
    names = _read_by_functions(module) if may_run else set[str]()
    return names | {ANY} if _has_parameters(held.values()) else names


def read_by_what_is_given(cls: type, held: Collection[Any]) -> set[str]:
    """Returns the names that code may read from a module that the forward of `cls` hands on; `ANY` if it may be any.

    That is the code of objects and classes that the forward's code names, or that the module holds.

    Args:
        cls: The module's class.
        held: What the module holds.
    """
    functions = functions_in_forward(cls)
    named = set().union(*(names_in(function.__code__).read for function in functions))
    own = {cls.__module__, *(type(value).__module__ for value in held)}
    names = set[str]()
    for function in functions_run([*functions, *held], named):
        if function not in functions:
            # as of a forward, only code beside the classes reads by any name
            names |= _read_precisely(function) - (set() if function.__module__ in own else {ANY})
    return names


def _read_precisely(function: FunctionType) -> set[str]:
    names = read_by(function)
    if ANY not in names:
        return names
    # the source tells more, but takes longer
    return {path.removeprefix("*.") for path, _ in paths_in(function, has_self=False)}


def has_hooks(module: nn.Module) -> bool:
    """Returns whether hooks run with the forward of a module, including hooks of all modules."""
    return any(map(vars(module).get, _HOOKS)) or any(FORWARD_HOOKS_OF_ALL)


def _read_by_functions(module: nn.Module) -> set[str]:
    """Returns the attribute names that the functions held by a module read from their arguments."""
    return set().union(*map(read_by, functions_called(functions_held(module)))) - {ANY}


def _may_lead_to_functions(value: Any) -> bool:
    return callable(value) or issubclass(type(value), (*CONTAINERS, tuple))


def _has_parameters(held: Iterable[Any]) -> bool:
    """Returns whether there are parameters, or functions with closures, among held values or in their containers."""
    waiting, seen = [*held], set[int]()
    while waiting:
        value = waiting.pop()
        if issubclass(type(value), dict | list | tuple):
            # a container may hold itself
            waiting += () if id(value) in seen else parts_of(value)
            seen.add(id(value))
        elif issubclass(type(value), nn.Parameter) or (type(value) is FunctionType and value.__closure__):
            return True
    return False


class Holding(NamedTuple):
    """An attribute that holds a module or a parameter without registering it.

    Attributes:
        path: The path of the holding module.
        name: The attribute, which holds it directly or in a container, an object or a function.
    """

    path: str
    name: str


def held_outside(
    modules: Mapping[str, nn.Module], held: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, str], list[Holding]]:
    """Returns the holdings of weights that the holding modules' code may read, by the weights' owner and name.

    Args:
        modules: The model's modules by path.
        held: The objects that some modules hold beside modules, parameters and plain values, by path.
    """
    known: dict[int, list[Held]] = {}
    holdings = []
    for path, of_module in held.items():
        if not of_module or is_of_pytorch(modules[path]):
            continue
        for name, value in of_module.items():
            # many modules hold the same config
            if id(value) not in known:
                known[id(value)] = list(reached_from(value))
            holdings += [(path, name, inner, codes) for inner, codes in known[id(value)]]
    if not holdings:
        return {}  # the case of nearly all models
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


Held = tuple[Any, frozenset[CodeType]]
"""A module or a parameter, with the code objects on the way to it."""


def reached_from(start: Any) -> Iterator[Held]:
    """Yields the modules and parameters that a value leads to, each with the code objects on the way to it."""
    waiting: list[Held] = [(start, frozenset())]
    seen: dict[int, Any] = {}
    while waiting:
        value, codes = waiting.pop()
        kind = type(value)  # isinstance would read __class__, which a user's object may compute
        if issubclass(kind, nn.Module | nn.Parameter):
            yield value, codes
        elif id(value) not in seen and not issubclass(kind, torch.Tensor | type):
            seen[id(value)] = value
            codes |= {value.__code__} if kind is FunctionType else _codes_of(kind)
            waiting += [
                (part, codes)
                for part in opened(value)[1]
                if type(part) not in _PLAIN_TYPES and not _holds_plain_values(part)
            ]


def _codes_of(cls: type) -> frozenset[CodeType]:
    return frozenset(member.__code__ for member in vars(cls).values() if type(member) is FunctionType)


def _reads(module: nn.Module, name: str, held: Any, codes: frozenset[CodeType], attribute: str) -> bool:
    """Returns whether the code of a module, or the code in `codes`, may read the parameter `attribute` of `held`."""
    if isinstance(held, nn.Parameter) or any(attribute in names_in(code).read for code in codes):
        return True
    uses = uses_in_forward(class_of_forward(module))
    elsewhere = uses.read_elsewhere | _read_by_functions(module)
    if not elsewhere.isdisjoint((attribute, ANY)):
        return True
    return any(path.startswith(f"{name}.") and path.endswith(f".{attribute}") for path in uses.read)
