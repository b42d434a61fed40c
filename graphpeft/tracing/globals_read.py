"""Finds the globals and closure variables that a forward reads. A graph holds their values at tracing time."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from graphpeft.code.reach import is_of_a_library
from graphpeft.code.source import functions_in_forward
from graphpeft.tracing.attributes import is_plain


def plain_globals(cls: type) -> dict[str, Any]:
    """Returns the plain globals and closure variables that a forward reads, each by a description of its name."""
    found = {name: value for function in functions_in_forward(cls) for name, value in _read_by(function)}
    return {name: value for name, value in found.items() if value is not None and is_plain(value)}


def _read_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields the globals of a user's that a function reads, and its closure variables."""
    for name, attributes in _globals_named_in(function.__code__).items():
        value: Any = function.__globals__.get(name)
        where = function.__globals__.get("__name__")
        if issubclass(type(value), ModuleType):
            found = {attribute: vars(value).get(attribute) for attribute in attributes if attribute is not None}
            where = value.__name__
        else:
            found = {name: value}
        if not is_of_a_library(where):
            yield from ((f"the global {each} of {where}", read) for each, read in found.items())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"the variable {name} around {function.__qualname__}", cell.cell_contents
        except ValueError:
            continue  # an empty cell


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
