"""Finds the globals and closure variables that a forward reads. A graph holds their values at tracing time."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any

from graphpeft.code.namespaces import attributes_of
from graphpeft.code.reach import is_of_a_library
from graphpeft.code.source import functions_in_forward
from graphpeft.tracing.attributes import is_plain


def plain_globals(cls: type) -> dict[str, Any]:
    """Returns the plain globals and closure variables that a forward reads, each by a description of its name."""
    return {name: value for name, value in globals_read(cls).items() if value is not None and is_plain(value)}


def globals_read(cls: type) -> dict[str, Any]:
    """Returns the globals and closure variables that a forward reads, but for code, by descriptions of their names."""
    return {name: value for function in functions_in_forward(cls) for name, value in _read_by(function)}


def _read_by(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    namespace = function.__globals__
    for name, attribute in _globals_named_in(function.__code__):
        value: Any = namespace.get(name, _CODE)
        file = namespace.get("__name__")
        if issubclass(type(value), ModuleType) and attribute is not None:
            name, value, file = attribute, vars(value).get(attribute, _CODE), value.__name__
        if not _is_code(value) and not is_of_a_library(file):
            yield f"the global {name} of {file}", value
            inside = attributes_of(value) or {}
            if attribute in inside:
                yield f"{attribute} of the global {name} of {file}", inside[attribute]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:
            continue  # an empty cell
        if not _is_code(value):
            yield f"the variable {name} around {function.__qualname__}", value


_CODE = object()
"""Stands for the value of a built-in name, or of one that isn't there."""


def _is_code(value: Any) -> bool:
    # what is called is looked through by its own code, and a module by its attributes
    return value is _CODE or callable(value) or issubclass(type(value), ModuleType)


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
