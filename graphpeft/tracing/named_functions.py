"""Patches functions of the user during a trace, in all places where the model's code finds them by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from graphpeft.code.reach import functions_held
from graphpeft.code.source import functions_called, functions_in_forward, names_in
from graphpeft.graph import in_place
from graphpeft.tracing.exchanges import Exchanges


def exchange_named(root: nn.Module, exchanges: Exchanges, other: Callable[[Any], Any]) -> None:
    """Replaces each value that the code of `root` finds by name with `other(value)`."""
    classes = {in_place.original_class(module) for module in root.modules()}
    functions = {function for cls in classes for function in functions_in_forward(cls)}
    functions.update(functions_called(held for module in root.modules() for held in functions_held(module)))
    for holder in {holder for cls in classes for base in cls.__mro__ for holder in _holders(base)}:
        for name, value in list(vars(holder).items()):
            if type(value) is FunctionType:
                functions.add(value)
            if (new := other(value)) is not value:
                exchanges.attribute(holder, name, new)
    for function in functions:
        _exchange_around(function, exchanges, other)


def _holders(cls: type) -> tuple[Any, ...]:
    """Returns the places of functions that methods of `cls` may call: the class and the Python module defining it."""
    module = sys.modules.get(cls.__module__)
    return () if module is None or cls.__module__.partition(".")[0] in ("torch", "builtins") else (cls, module)


def _exchange_around(function: FunctionType, exchanges: Exchanges, other: Callable[[Any], Any]) -> None:
    """Replaces values in a function's closure, its globals, and the Python modules that it names."""
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:
            continue  # an empty cell
        if (new := other(value)) is not value:
            exchanges.cell(cell, new)
    names = names_in(function.__code__).read
    modules = [vars(value) for name in names if type(value := function.__globals__.get(name)) is ModuleType]
    for namespace in (function.__globals__, *modules):
        for name in names & namespace.keys():
            value = namespace[name]
            if (new := other(value)) is not value:
                exchanges.item(namespace, name, new)
