"""Which modules read weights of others without calling these, as far as their source tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft.code.attribute_paths import ANY
from graphpeft.code.contents import PLAIN, parts_of
from graphpeft.code.reach import functions_held, opened
from graphpeft.code.source import functions_called, methods_reading, names_in, read_by, uses_in_forward
from graphpeft.graph import in_place
from graphpeft.graph.paths import join
from graphpeft.graph.template import runs_graph


def readers_around(modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], list[str]]:
    """Returns, by owner and name, the tensors that modules around their owner read, with the paths of these modules."""
    found: dict[tuple[str, str], list[str]] = {}
    paths = {id(module): path for path, module in modules.items()}
    for path, module in modules.items():
        if runs_graph(module) or not module._modules or _is_off(module):
            continue  # a graph tells by itself
        uses = uses_in_forward(in_place.original_class(module))
        for owner, name in dict.fromkeys(_tensor_at(module, used) for used in (*uses.read, *uses.called)):
            # a module in several places is known by its first one
            if owner is not module and (name in owner._parameters or name in owner._buffers):
                found.setdefault((paths[id(owner)], name), []).append(path)
    return found


def _tensor_at(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Returns the module to which a path leads, and the next name in it; behind that may be more, as in `weight.T`."""
    for name in path.split("."):
        inner = module._modules.get(name)
        if inner is None:
            return module, name
        module = inner
    return module, ""


def caller_of_other_methods(modules: Mapping[str, nn.Module], path: str, names: Iterable[str]) -> str | None:
    """Returns the path of a module that may call a method of another one which reads tensors beside its forward.

    Args:
        modules: The model's modules by path.
        path: That of the other module.
        names: The names of the tensors.
    """
    cls = in_place.original_class(modules[path])
    methods = {method for name in names for method in methods_reading(cls, name)} - {"forward"}
    for around, module in modules.items() if methods else ():
        uses = uses_in_forward(in_place.original_class(module))
        called = (each.rpartition(".") for each in uses.called)
        if any(method in methods and owner and _inside(module, owner) is modules[path] for owner, _, method in called):
            return around
        if not methods.isdisjoint(uses.read_elsewhere) and modules[path] in module.modules():
            return around
    return None


def _inside(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


class MayRead(NamedTuple):
    """What a module's code may read of modules inside it, where no path from ``self`` tells which.

    Attributes:
        names: The names of attributes; `ANY` if it may be any.
        handed_on: The paths of modules inside that it hands on.
    """

    names: set[str]
    handed_on: set[str]


def may_read(modules: Mapping[str, nn.Module]) -> dict[str, MayRead]:
    """Returns the modules whose forward hands on a module inside, or reads attributes of what isn't a path from it."""
    found = {}
    for path, module in modules.items():
        if runs_graph(module) or not module._modules or _is_off(module):
            continue
        uses = uses_in_forward(in_place.original_class(module))
        names = uses.read_elsewhere | ({ANY} if holds_parameters(module) else set())
        names |= _read_by_held(module)
        handed_on = {read for read in uses.read if join(path, read) in modules}
        if names or handed_on:
            found[path] = MayRead(names, handed_on)
    return found


def _read_by_held(module: nn.Module) -> set[str]:
    """Returns the names of attributes that the functions read, from whatever they are given, which a module holds."""
    return set().union(*map(read_by, functions_called(functions_held(module)))) - {ANY}


def holds_parameters(module: nn.Module) -> bool:
    """Tells whether a module holds parameters in lists and the like, or closures, by which it may read others'."""
    waiting = [value for name, value in module.__dict__.items() if name not in _TABLES]
    while waiting:
        value = waiting.pop()
        if issubclass(type(value), dict | list | tuple):
            waiting += parts_of(value)
        elif issubclass(type(value), nn.Parameter) or (type(value) is FunctionType and value.__closure__):
            return True
    return False


_TABLES = frozenset(vars(nn.Module()))
"""What every module has: its parameters, its submodules, its hooks."""


def _is_off(module: nn.Module) -> bool:
    """Tells whether the code of a module that reads weights without calling their modules is switched off."""
    return isinstance(module, nn.TransformerEncoderLayer) and not torch.backends.mha.get_fastpath_enabled()


class Holding(NamedTuple):
    """What holds a module or a parameter otherwise than by registering it.

    Attributes:
        path: The path of the module that holds it.
        name: The attribute in which it does, whether by itself, in a container, an object or a function.
    """

    path: str
    name: str


def held_outside(modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], list[Holding]]:
    """Returns, by owner and name, what holds weights that its code may read where no path of modules leads to them."""
    known: dict[int, tuple[Any, list[_Held]]] = {}
    holdings = [(path, module, held) for path, module in modules.items() for held in _held(module, known)]
    if not holdings:
        return {}  # as in nearly all models
    places = {
        id(weight): (path, name)
        for path, module in modules.items()
        for name, weight in module._parameters.items()
        if weight is not None
    }
    found: dict[tuple[str, str], list[Holding]] = {}
    for path, module, (name, held, codes) in holdings:
        for weight in held.parameters() if isinstance(held, nn.Module) else (held,):
            place = places.get(id(weight))
            if place is not None and place[0] != path and _reads(module, name, held, codes, place[1]):
                found.setdefault(place, []).append(Holding(path, name))
    return found


_LEADING_NOWHERE = PLAIN - {nn.Parameter}
"""Types of values that hold no module and no parameter."""

_Held = tuple[Any, frozenset[CodeType]]
"""A module or a parameter, with the code that leads to it."""


def _held(
    module: nn.Module, known: dict[int, tuple[Any, list[_Held]]]
) -> Iterator[tuple[str, Any, frozenset[CodeType]]]:
    """Yields the modules and parameters that one holds without registering them: its attribute, what, by which code.

    Args:
        module: The module.
        known: What values lead to, by their ids, since many modules hold one config; filled in.
    """
    if runs_graph(module) or type(module).__module__.startswith("torch.nn.modules."):
        return
    for name, value in module.__dict__.items():
        if name in _TABLES or type(value) in _LEADING_NOWHERE:
            continue
        if id(value) not in known:
            known[id(value)] = value, list(_reached_from(value))
        yield from ((name, held, codes) for held, codes in known[id(value)][1])


def _reached_from(start: Any) -> Iterator[_Held]:
    waiting: list[_Held] = [(start, frozenset())]
    seen: dict[int, Any] = {}
    while waiting:
        value, codes = waiting.pop()
        kind = type(value)  # isinstance asks an object of a user's for its __class__
        if kind in _LEADING_NOWHERE:
            continue
        if issubclass(kind, nn.Module | nn.Parameter):
            yield value, codes
        elif id(value) not in seen and not issubclass(kind, torch.Tensor | type):
            seen[id(value)] = value
            codes |= frozenset(_codes_of(value))
            waiting += [(part, codes) for part in opened(value)[1]]


def _codes_of(value: Any) -> Iterable[CodeType]:
    functions = [value, *vars(type(value)).values()]
    return (function.__code__ for function in functions if type(function) is FunctionType)


def _reads(module: nn.Module, name: str, held: Any, codes: frozenset[CodeType], attribute: str) -> bool:
    """Tells whether the code of a module, or that by which it holds another, may read its parameter `attribute`."""
    if isinstance(held, nn.Parameter) or any(attribute in names_in(code).read for code in codes):
        return True
    uses = uses_in_forward(in_place.original_class(module))
    elsewhere = uses.read_elsewhere | _read_by_held(module)
    if not elsewhere.isdisjoint((attribute, ANY)):
        return True
    return any(path.startswith(f"{name}.") and path.endswith(f".{attribute}") for path in uses.read)
