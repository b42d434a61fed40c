"""Copies of graphs, also with targets that can be pickled."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.fx.node import map_arg

from graphpeft._torch import OpOverload, empty_graph_like


def copy_graph(graph: fx.Graph, target: Callable[[Any], Any] = lambda target: target) -> fx.Graph:
    """Copies a graph with its code generator and shallow copies of its nodes' metadata."""
    copied = empty_graph_like(graph)
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), nodes.__getitem__)  # type: ignore[misc]
        nodes[node] = copied.create_node(node.op, target(node.target), args, kwargs, node.name, node.type)
        nodes[node].meta = copy.copy(node.meta)
    return copied


class _NamedOperator:
    """Replaces an operator of ``torch.ops`` in a pickle, since the operator itself can't be pickled."""

    def __init__(self, name: str) -> None:
        self.name = self.__name__ = name

    def __call__(self) -> Any:
        raise TypeError(f"{self.name} is a name in a pickle")


def as_named(target: Any) -> Any:
    """Returns a target that can be pickled."""
    return _NamedOperator(str(target)) if isinstance(target, OpOverload) else target


def by_name(target: Any) -> Any:
    """Returns the target of which `as_named` has made one that can be pickled."""
    if isinstance(target, _NamedOperator):
        return functools.reduce(getattr, target.name.split("."), torch.ops)
    return target
