"""Functions with a cache that a model's code calls, which compute anew while it is traced.

What such a cache holds of a trace would be given to later calls, and what it holds of earlier ones would be frozen.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch.fx as fx
from torch import nn

from graphpeft import in_place
from graphpeft.tracing.exchanges import Exchanges
from graphpeft.tracing.reach import functions_held
from graphpeft.tracing.source import functions_called, functions_in_forward, names_in

_CACHED = functools._lru_cache_wrapper


def exchange_caches(root: nn.Module, exchanges: Exchanges) -> None:
    """Puts the functions in the place of those with a cache, wherever the code of `root` finds them by name."""
    classes = {in_place.original_class(module) for module in root.modules()}
    functions = {function for cls in classes for function in functions_in_forward(cls)}
    functions.update(functions_called(held for module in root.modules() for held in functions_held(module)))
    for holder in {holder for cls in classes for base in cls.__mro__ for holder in _holders(base)}:
        for name, value in list(vars(holder).items()):
            if isinstance(value, _CACHED):
                exchanges.attribute(holder, name, value.__wrapped__)
            elif isinstance(value, FunctionType):
                functions.add(value)
    for function in functions:
        _exchange_around(function, exchanges)


def _holders(cls: type) -> tuple[Any, ...]:
    """Returns what may have functions that methods of `cls` call: itself, and the Python module that defines it."""
    module = sys.modules.get(cls.__module__)
    return () if module is None or cls.__module__.partition(".")[0] in ("torch", "builtins") else (cls, module)


def _exchange_around(function: FunctionType, exchanges: Exchanges) -> None:
    """Does so for what a function finds in its Python module, in those that it names, and in variables around it."""
    for cell in function.__closure__ or ():
        try:
            cached = cell.cell_contents
        except ValueError:
            continue  # an empty cell
        if isinstance(cached, _CACHED):
            exchanges.cell(cell, cached.__wrapped__)
    names = names_in(function.__code__).read
    modules = [vars(value) for name in names if isinstance(value := function.__globals__.get(name), type(sys))]
    for namespace in (function.__globals__, *modules):
        for name in names & namespace.keys():
            if isinstance(namespace[name], _CACHED):
                exchanges.item(namespace, name, namespace[name].__wrapped__)


def forget_traced_values() -> None:
    """Clears the caches that hold values of a trace after all, such as those of libraries' classes."""
    for value in gc.get_objects():
        if type(value) is _CACHED and any(map(_is_traced, _content_of(value))):
            value.cache_clear()


def _content_of(cached: Any) -> Iterator[Any]:
    """Yields the arguments and the results that a cache holds."""
    for part in gc.get_referents(cached):
        # a bounded cache refers to both by itself
        yield from (*dict.keys(part), *dict.values(part)) if type(part) is dict else (part,)


def _is_traced(value: Any, depth: int = 4) -> bool:
    # by its type, since a value of a model's may answer anything
    if issubclass(type(value), fx.Proxy):
        return True
    if depth == 0 or type(value) not in (tuple, list, dict, set, frozenset):
        return False
    return any(_is_traced(part, depth - 1) for part in ((*value, *value.values()) if type(value) is dict else value))
