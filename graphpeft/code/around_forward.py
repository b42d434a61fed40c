"""The code that runs around a forward, and the attributes that it reads: hooks, and a class's own ``__call__``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any

from graphpeft.code.attribute_paths import paths_in
from graphpeft.code.source import functions_called, read_by


def functions_around(start: Any, cls: type) -> set[FunctionType]:
    """Returns the functions that a hook or a ``__call__`` may run beside the forward, but for PyTorch's.

    Args:
        start: The hook, or the ``__call__``: a function, a method, a partial function, or an object that is called.
        cls: The class of the module with which it runs, without its forward.
    """
    found: set[FunctionType] = set()
    waiting = [*_parts(start)]
    classes = dict.fromkeys([cls, *map(type, waiting)])
    while waiting:
        new = {function for each in classes for function in functions_called(waiting, each)} - found
        found |= new
        waiting = [*new]
    return found


def read_by_any(functions: Iterable[FunctionType]) -> set[str]:
    """Returns the names of attributes that functions read from any value, with `ANY` if a name is unknown."""
    return set[str]().union(*map(_read_by, functions))


def _parts(start: Any) -> Iterator[Any]:
    """Yields the functions that run in a call of an object, and the objects that hold them."""
    kind = type(start)
    if issubclass(kind, functools.partial):
        yield from start.args
        yield from start.keywords.values()
        yield from _parts(start.func)
    elif issubclass(kind, MethodType):
        yield start.__self__
        yield start.__func__
    elif issubclass(kind, FunctionType):
        yield start
    else:
        yield start
        yield from _parts(kind.__call__)


def _read_by(function: FunctionType) -> set[str]:
    in_source = {path.removeprefix("*.") for path, _ in paths_in(function, has_self=False)}
    # Python has a lambda's source by lines, with the code around it
    return in_source & read_by(function) if function.__name__ == "<lambda>" else in_source
