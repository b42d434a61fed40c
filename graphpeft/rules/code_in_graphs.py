"""The code of rules on proxies: it appends nodes to a graph, and is given values by the names of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch.fx.proxy import GraphAppendingTracer

from graphpeft.graph.autocast import depth_of_autocast
from graphpeft.graph.call_inputs import CallInput, call_input
from graphpeft.rules.arguments import asked_by


class RuleTracer(GraphAppendingTracer):
    """Appends the operations of a rule's code on proxies to a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self._depth = depth_of_autocast()

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Returns the proxy of a new node."""
        if not torch.is_grad_enabled():
            raise RuleError(
                "it computes under torch.no_grad(), which a graph can't hold; call detach() on what is to have no "
                "gradient, or call a function that is `recorded`"
            )
        if depth_of_autocast() != self._depth:
            raise RuleError(
                "it computes under torch.autocast(), which a graph can't hold; call a function that is `recorded`"
            )
        return super().create_proxy(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Returns an argument of a node."""
        if isinstance(a, torch.Tensor):
            raise RuleError(
                f"it computes with a tensor of shape {tuple(a.shape)} of its own, which a graph can't hold; make it "
                "from an argument, as x.new_ones(3) does, or in a function that is `recorded`, or declare it as a "
                "parameter that isn't trained"
            )
        return super().create_arg(a)


class RuleError(Exception):
    """The code of a rule can't be put into a graph."""


def given_to(
    function: Callable[..., Any],
    tracer: RuleTracer,
    nodes: Mapping[str, fx.Node],
    paths: Mapping[str, str | CallInput | None],
    values: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the values that the names of a function's arguments ask for, with nodes as proxies."""
    graph = tracer.graph
    paths = {"training": "training", **paths}

    def value_of(name: str) -> Any:
        if name in values:
            return values[name]
        if name in nodes:
            return fx.Proxy(nodes[name], tracer)
        path = paths[name]
        if isinstance(path, CallInput):
            return fx.Proxy(graph.call_function(call_input, (path.name,)), tracer)
        return fx.Proxy(graph.create_node("get_attr", path), tracer) if path is not None else None

    asked = asked_by(function).among((*values, *nodes, *paths))
    return {name: value_of(name) for name in asked}
