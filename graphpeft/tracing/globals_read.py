"""Finds the globals and closure variables that a forward reads. A graph holds their values at tracing time."""

from __future__ import annotations

import dis
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from graphpeft.code.namespaces import attributes_of
from graphpeft.code.reach import is_of_a_library
from graphpeft.code.source import functions_in_forward
from graphpeft.tracing.attributes import is_plain


def plain_globals(cls: type) -> dict[str, Any]:
    """Returns the plain globals and closure variables that a forward reads, each by a description of its name."""
    found = {name: value for function in functions_in_forward(cls) for name, value in _read_by(function)}
    return {name: value for name, value in found.items() if value is not None and is_plain(value)}


def globals_read(cls: type) -> list[tuple[str, Any]]:
    """Returns what a forward reads beside its module and its arguments, with descriptions, which may be equal.

    That is its globals and closure variables, attributes of those and of classes, and defaults of arguments. Functions
    and classes among them are weak references.
    """
    found: list[tuple[str, Any]] = []
    for function in functions_in_forward(cls):
        found += _read_by(function)
        found += _inside_globals(function)
        found += _of_classes(function, cls)
        found += [("a default", value) for value in (function.__defaults__ or ())]
        found += (function.__kwdefaults__ or {}).items()
    return found


def _of_classes(function: Callable[..., Any], cls: type) -> Iterator[tuple[str, Any]]:
    """Yields the attributes of a module's classes that a function names, as in ``type(self).mode``."""
    for base in cls.__mro__:
        for name in function.__code__.co_names:
            if name in vars(base):
                yield f"{name} of the class {base.__qualname__}", _weak(vars(base)[name])


def _read_by(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yields the globals and closure variables that a function reads."""
    for name, _, value in _globals_of(function):
        yield f"the global {name}", _weak(value)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:
            continue  # an empty cell
        yield f"the variable {name} around {function.__qualname__}", _weak(value)


def _inside_globals(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yields the attributes of globals that a function reads, as in ``OPTIONS.mode``."""
    for name, attribute, value in _globals_of(function):
        inside = next((held[attribute] for held in _namespaces(value) if attribute and attribute in held), _ABSENT)
        if inside is not _ABSENT:
            yield f"{attribute} of the global {name}", _weak(inside)


def _globals_of(function: Callable[..., Any]) -> Iterator[tuple[str, str | None, Any]]:
    """Yields the globals of a user's that a function names: a description, the attribute read of it, and the value."""
    namespace = function.__globals__
    for name, attribute in _globals_named_in(function.__code__):
        value: Any = namespace.get(name, _ABSENT)
        file = namespace.get("__name__")
        if issubclass(type(value), ModuleType) and attribute is not None:
            name, value, file = attribute, vars(value).get(attribute, _ABSENT), value.__name__
        if value is not _ABSENT and not is_of_a_library(file):
            yield f"{name} of {file}", attribute, value


def _namespaces(value: Any) -> list[Mapping[str, Any]]:
    """Returns the attributes of a class and its bases, or an object's own."""
    if issubclass(type(value), type):
        return [vars(base) for base in value.__mro__]
    return [vars(value) if type(value) is FunctionType else attributes_of(value) or {}]


_ABSENT = object()
"""Stands for the value of a built-in name, or of one that isn't there."""


def _weak(value: Any) -> Any:
    """Returns a weak reference to a function, also one in a property, or to a class: it may hold the module's own."""
    if issubclass(type(value), _AROUND_FUNCTIONS):
        value = next(getattr(value, name) for name in ("fget", "func", "__func__") if hasattr(value, name))
    return weakref.ref(value) if issubclass(type(value), _REFERRED) else value


_AROUND_FUNCTIONS = (property, functools.cached_property, classmethod, staticmethod)
_REFERRED = (type, FunctionType, type(functools.cache(len)))
"""Types whose objects are referred to weakly: a recording is kept as long as the class, which they may hold."""


def imports_code_of_a_user(code: CodeType) -> bool:
    """Returns whether code imports a module of a user's each time that it runs."""
    return any(each.opname == "IMPORT_NAME" and not is_of_a_library(each.argval) for each in dis.get_instructions(code))


@functools.cache
def _globals_named_in(code: CodeType) -> tuple[tuple[str, str | None], ...]:
    """Returns the names of globals that `code` reads, each with the attribute that it reads of this global, or None."""
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "EXTENDED_ARG")]
    found: dict[tuple[str, str | None], None] = {}
    for instruction, following in zip(instructions, [*instructions[1:], None], strict=True):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            takes = following is not None and following.opname in ("LOAD_ATTR", "LOAD_METHOD")
            found[instruction.argval, following.argval if takes and following is not None else None] = None
    inside = [
        name for constant in code.co_consts if isinstance(constant, CodeType) for name in _globals_named_in(constant)
    ]
    return (*found, *inside)
