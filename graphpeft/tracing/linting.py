"""Checks each finished graph, lifted or flat, before it is used."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import pytree
from graphpeft.code.namespaces import attributes_of
from graphpeft.graph.errors import TraceError

_WAY_OUT = (
    "the model's code has kept it where a trace doesn't look, such as in a cache of its own; let that code compute it "
    "in each call"
)


def lint(graph: fx.Graph, constants: Mapping[str, Any]) -> None:
    """Raises TraceError unless each node uses only values that earlier nodes of this graph compute."""
    defined: set[fx.Node] = set()
    for node in graph.nodes:
        for used in node.all_input_nodes:
            if used not in defined:
                raise TraceError(f"{_shown(node)} uses {used.name}, which this recording hasn't computed: {_WAY_OUT}")
        if any(map(holds_proxy, (node.target, *pytree.tree_leaves((node.args, node.kwargs))))):
            raise TraceError(f"{_shown(node)} is given a value of a trace inside an object: {_WAY_OUT}")
        defined.add(node)
    for name, value in constants.items():
        if holds_proxy(value):
            raise TraceError(f"the {type(value).__name__} {name} holds a value of a trace: {_WAY_OUT}")


def _shown(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"{node.name}, a call of {name},"


def holds_proxy(value: Any, depth: int = 4) -> bool:
    """Returns whether `value` is a proxy, or an object or container that holds a proxy."""
    # type(), since isinstance would read __class__, which user objects can override
    kind = type(value)
    if issubclass(kind, fx.Proxy):
        return True
    if depth == 0 or issubclass(kind, torch.Tensor | nn.Module | type | fx.Node):
        return False
    return any(holds_proxy(part, depth - 1) for part in _inside(value))


def _inside(value: Any) -> Iterator[Any]:
    kind = type(value)
    if issubclass(kind, dict):
        yield from dict.values(value)
    elif issubclass(kind, list | tuple | set):
        # the base class's __iter__, which a user's subclass may override
        yield from next(base for base in (list, tuple, set) if issubclass(kind, base)).__iter__(value)
    elif issubclass(kind, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif kind is MethodType:
        yield value.__self__
    elif kind is FunctionType:
        yield from filter(None, (value.__defaults__, value.__kwdefaults__))
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield cell.cell_contents
    yield from (attributes_of(value) or {}).values()
