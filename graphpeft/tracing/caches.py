"""Functions with a cache that a model's code calls, which compute anew while it is traced."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any
from unittest import mock

from torch import nn


@contextlib.contextmanager
def uncached(root: nn.Module) -> Iterator[None]:
    """Lets functions with a cache compute anew: a cache would keep what belongs to the trace, or freeze what it has."""
    with contextlib.ExitStack() as stack:
        for holder in {owner for module in root.modules() for cls in type(module).__mro__ for owner in _holders(cls)}:
            for name, value in list(vars(holder).items()):
                if isinstance(value, _CACHED):
                    stack.enter_context(mock.patch.object(holder, name, value.__wrapped__))
                if isinstance(value, FunctionType):
                    for cell in value.__closure__ or ():
                        stack.enter_context(_uncached_cell(cell))
        yield


_CACHED = functools._lru_cache_wrapper


def _holders(cls: type) -> tuple[Any, ...]:
    """Returns what may have functions that methods of `cls` call: itself, and the Python module that defines it."""
    module = sys.modules.get(cls.__module__)
    return () if module is None or cls.__module__.partition(".")[0] in ("torch", "builtins") else (cls, module)


@contextlib.contextmanager
def _uncached_cell(cell: Any) -> Iterator[None]:
    try:
        cached = cell.cell_contents
    except ValueError:
        cached = None  # an empty cell
    if not isinstance(cached, _CACHED):
        yield
        return
    cell.cell_contents = cached.__wrapped__
    try:
        yield
    finally:
        cell.cell_contents = cached
