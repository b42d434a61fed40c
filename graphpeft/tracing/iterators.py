"""Finds iterators that a forward can draw from. A graph can't hold draws, so a module that names one stays a call.

An iterator doesn't show its position and can't be rewound. So a recording doesn't run the code of such a module, and
runs on example values draw from copies of the iterators.
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
"""Names that read attributes without naming them in code."""


def drawing_modules(reach: Reach) -> dict[nn.Module, str]:
    """Returns the modules whose code names an iterator outside the model's modules, with the iterator's name in code.

    Iterators in attributes of the model's modules are found when the code reads the attributes.
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
    """Returns the error for code that can draw from the iterator `name`."""
    return TraceError(f"a forward can draw from {name}, an iterator, which a graph can't hold")


def exchange_for_copies(reach: Reach) -> None:
    """Binds the names of iterators, and of objects that hold iterators, to copies."""
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
        # type(), since isinstance would read __class__, which user objects can override
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
