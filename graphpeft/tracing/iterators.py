"""Iterators that a forward can draw from: a graph can't hold that, so a module whose code names one stays a call.

An iterator doesn't tell how far it has come, and can't be set back. So the code of such a module doesn't run in a
recording, and draws from copies where it runs on example values.
"""

from __future__ import annotations

import copy
import functools
from types import BuiltinMethodType, CellType, FunctionType, MethodType, MethodWrapperType
from typing import Any

from torch import nn

from graphpeft.code.contents import CONTAINERS, PLAIN, parts_of
from graphpeft.code.reach import Reach, is_iterator
from graphpeft.graph.errors import TraceError

_LOOKS_UP_ANY_NAME = frozenset(("__dict__", "__getattribute__", "attrgetter", "getattr", "getmembers", "vars"))
"""Names of what reads attributes without naming them in code."""


def drawing_modules(reach: Reach) -> dict[nn.Module, str]:
    """Returns the modules whose code names an iterator outside of the model's modules, with what it is to the code.

    What code reads from the model's modules shows when it reads it.
    """
    found: dict[nn.Module, str] = {}
    reads_any = not reach.names.isdisjoint(_LOOKS_UP_ANY_NAME)
    for namespace in reach.namespaces:
        if issubclass(type(namespace.of), nn.Module) and reach.owners(namespace) == [namespace.of]:
            continue
        are_named = reads_any or issubclass(type(namespace.of), FunctionType | CellType)
        for name, value in namespace.values().items():
            if (are_named or name in reach.names) and holds_iterator(value):
                found |= {module: namespace.describe(name, module) for module in reach.owners(namespace)}
    return found


def draws_error(name: str) -> TraceError:
    """Returns the error for code that can draw from an iterator, which has this name for it."""
    return TraceError(f"a forward can draw from {name}, an iterator, which a graph can't hold")


def exchange_for_copies(reach: Reach) -> None:
    """Binds names of iterators, and of what holds some, to copies.

    Raises:
        TraceError: If one can't be copied, such as a generator.
    """
    for namespace in reach.namespaces:
        for name, value in list(namespace.values().items()):
            if not holds_iterator(value):
                continue
            try:
                namespace.bind(name, copy.deepcopy(value))
            except TypeError as error:
                described = namespace.describe(name, reach.owners(namespace)[0])
                message = f"a forward can draw from {described}, a {type(value).__name__}, which can't be copied"
                raise TraceError(message) from error


def holds_iterator(value: Any) -> bool:
    """Returns whether a value is an iterator, or holds one in a container, a partial function or a bound method."""
    waiting, seen = [value], set[int]()
    while waiting:
        held = waiting.pop()
        # by its type: what is asked by isinstance, an object may answer by code of its own
        kind = type(held)
        if kind in PLAIN or id(held) in seen:
            continue
        if is_iterator(held):
            return True
        seen.add(id(held))
        if issubclass(kind, (*CONTAINERS, tuple)):
            waiting += parts_of(held)
        elif issubclass(kind, functools.partial):
            waiting += (held.func, held.args, held.keywords)
        elif issubclass(kind, MethodType | BuiltinMethodType | MethodWrapperType):
            waiting.append(held.__self__)
    return False
