"""Finds the globals and closure variables that a forward reads. A graph holds their values at tracing time."""

from __future__ import annotations

import dis
import enum
import functools
import weakref
from collections.abc import Container, Iterator, Set
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from graphpeft.code.reach import is_of_a_library
from graphpeft.code.source import functions_in_forward, names_in
from graphpeft.tracing.attributes import is_plain


class Weak(weakref.ref[Any]):
    """A reference to a function or a class, which may hold what refers to it. Equal references are to the same one."""

    __slots__ = ()


class Unseen:
    """Stands for a value that code may read by a name that isn't known; it equals nothing."""


def plain_globals(cls: type) -> dict[str, Any]:
    """Returns the plain globals and closure variables that a forward reads, each by a description of its name."""
    found = {name: value for function in functions_in_forward(cls) for name, value in _read_by(function)}
    return {name: value for name, value in found.items() if value is not None and is_plain(value)}


def globals_read(cls: type) -> list[tuple[str, Any]]:
    """Returns what a forward reads beside its module and its arguments, with descriptions, which may be equal.

    That is its globals and closure variables, attributes of those and of classes, and defaults of arguments. For a
    function or a class there is a `Weak` reference. What a library's code reads of its own isn't among it.
    """
    functions = functions_in_forward(cls)
    found: list[tuple[str, Any]] = []
    for function in functions:
        names = names_in(function.__code__).read
        found += _of_classes(cls, names)
        if _is_of_a_user(function):
            for name, value in (*_read_by(function), *_defaults_of(function)):
                found.append((name, _weak(value)))
                found += [(f"{inside} of {name}", held) for inside, held in _inside(value, names, functions)]
    return found


def _of_classes(cls: type, names: Set[str]) -> Iterator[tuple[str, Any]]:
    """Yields the attributes of a class and those above it that a function names, as in ``type(self).mode``."""
    for base in cls.__mro__:
        for name in sorted(names & vars(base).keys()):
            yield f"{name} of the class {base.__qualname__}", _weak(vars(base)[name])


def _read_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields the globals of a user's that a function reads, and its closure variables."""
    where = function.__globals__.get("__name__")
    is_of_a_user = not is_of_a_library(where)
    for name, attributes in _globals_named_in(function.__code__).items():
        value = function.__globals__.get(name, _ABSENT)
        if issubclass(type(value), ModuleType) and None not in attributes and not is_of_a_library(value.__name__):
            for attribute in attributes:
                yield f"the global {attribute} of {value.__name__}", vars(value).get(attribute, Unseen())
        elif value is not _ABSENT and is_of_a_user:
            yield f"the global {name} of {where}", value
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield f"the variable {name} around {function.__qualname__}", _content_of(cell)


def _content_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return Unseen()  # the cell is empty


def _defaults_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield f"a default of {function.__qualname__}", value


def _inside(value: Any, names: Set[str], functions: Container[FunctionType]) -> Iterator[tuple[str, Any]]:
    """Yields the attributes of a user's function or class that code names; `Unseen` where they may be others."""
    holders: list[Any] = []
    if issubclass(type(value), type) and not is_of_a_library(value.__module__):
        holders = [base for base in value.__mro__ if not is_of_a_library(base.__module__)]
        # other classes may say of themselves how they are called, indexed and so on
        if not issubclass(value, _CLASSES_BY_NAMES):
            yield "an operator", Unseen()
    elif type(value) is FunctionType and _is_of_a_user(value):
        holders = [value]
    for holder in holders:
        for name in sorted(names & vars(holder).keys()):
            held = _weak(vars(holder)[name])
            function = held() if type(held) is Weak else None
            is_run = type(function) is FunctionType and _is_of_a_user(function) and function not in functions
            yield name, Unseen() if is_run else held


_CLASSES_BY_NAMES = (nn.Module, enum.Enum, torch.autograd.Function)
"""Classes whose members code uses by their names alone, since it makes no objects of them."""


def _is_of_a_user(function: FunctionType) -> bool:
    return not is_of_a_library(function.__globals__.get("__name__"))


_ABSENT = object()
"""Stands for the value of a built-in name, or of one that isn't there."""


def _weak(value: Any) -> Any:
    """Returns a weak reference to a function, also one in a property, or to a class; other values as they are."""
    while type(value) in _AROUND_FUNCTIONS:
        value = getattr(value, _AROUND_FUNCTIONS[type(value)])
    return Weak(value) if issubclass(type(value), _REFERRED) else value


_AROUND_FUNCTIONS: dict[type, str] = {
    property: "fget",
    functools.cached_property: "func",
    classmethod: "__func__",
    staticmethod: "__func__",
}
"""Decorators of methods, and the attribute in which each holds the function."""

_REFERRED = (type, FunctionType, type(functools.cache(len)))
"""Types whose objects are referred to weakly: a recording is kept as long as the class, which they may hold."""


def imports_code_of_a_user(code: CodeType) -> bool:
    """Returns whether code, or a function inside it, imports a module of a user's each time that it runs."""
    inside = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    imported = [each.argval for each in dis.get_instructions(code) if each.opname == "IMPORT_NAME"]
    return not all(map(is_of_a_library, imported)) or any(map(imports_code_of_a_user, inside))


@functools.cache
def _globals_named_in(code: CodeType) -> dict[str, dict[str | None, None]]:
    """Returns the globals that `code` reads, by name, with the attributes that it reads of each, or None for itself."""
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "EXTENDED_ARG")]
    found: dict[str, dict[str | None, None]] = {}
    for instruction, following in zip(instructions, [*instructions[1:], None], strict=True):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            takes = following is not None and following.opname in ("LOAD_ATTR", "LOAD_METHOD")
            attribute = following.argval if takes and following is not None else None
            found.setdefault(instruction.argval, {})[attribute] = None
    for constant in code.co_consts:
        for name, attributes in _globals_named_in(constant).items() if isinstance(constant, CodeType) else ():
            found.setdefault(name, {}).update(attributes)
    return found
