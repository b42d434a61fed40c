"""The way into and out of a module's forward, where adapters change what a module is given and what it returns.

For this the module needs no trace: `call_through` makes a graph that has the forward's arguments, and calls it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch import nn

from graphpeft import in_place
from graphpeft.tags import TAG
from graphpeft.tracing.errors import TraceError
from graphpeft.tracing.graph_module import OWN_FORWARD, Template
from graphpeft.tracing.tracer import SIMPLE

NAME = "(forward)"
"""What a `Boundary` is called in sites and tags."""


@dataclass(frozen=True)
class Boundary:
    """The boundary of the forward that a graph is.

    Attributes:
        inputs: The nodes of the arguments, by name.
        output: The node of the value that is returned.
        inside: The nodes between, but for those of adapters of the boundary.
    """

    inputs: Mapping[str, fx.Node]
    output: fx.Node
    inside: frozenset[fx.Node]

    @property
    def name(self) -> str:
        """What the boundary is called in tags."""
        return NAME


def boundary_of(graph: fx.Graph) -> Boundary:
    """Returns the boundary of `graph`.

    Raises:
        TraceError: If it returns something else than one value that it has computed.
    """
    own = [node for node in graph.nodes if TAG not in node.meta or node.meta[TAG].site != NAME]
    inputs = {str(node.target).lstrip("*"): node for node in own if node.op == "placeholder"}
    over = {node.name: node.meta[TAG].over for node in graph.nodes if node not in own}
    returned = graph.output_node().args[0]
    while isinstance(returned, fx.Node) and over.get(returned.name) is not None:
        returned = next(node for node in graph.nodes if node.name == over[returned.name])
    if not isinstance(returned, fx.Node):
        raise TraceError("its graph returns a container of values, where an adapter needs one value")
    return Boundary(inputs, returned, frozenset(n for n in own if n.op not in ("placeholder", "output")))


def call_through(module: nn.Module) -> Template:
    """Returns the template of a graph with the arguments of `module`'s own forward, which only calls it."""
    return _calling(in_place.original_class(module).forward)


@functools.lru_cache(maxsize=256)
def _calling(forward: Callable[..., Any]) -> Template:
    graph = fx.Graph()
    args: list[Any] = []
    given: dict[str, fx.Node] = {}
    more: list[fx.Node] = []
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        placeholder = _placeholder(graph, parameter)
        if parameter.kind is parameter.VAR_KEYWORD:
            more.append(placeholder)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            raise TraceError(f"its forward takes *{parameter.name}, whose values have no names")
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            args.append(placeholder)
        else:
            given[parameter.name] = placeholder
    own_forward = graph.create_node("get_attr", OWN_FORWARD, name="own_forward")
    graph.output(graph.call_function(call, (own_forward, tuple(args), given, *more)))
    return Template((graph,), shared=True)


def _placeholder(graph: fx.Graph, parameter: inspect.Parameter) -> fx.Node:
    if parameter.kind is parameter.VAR_KEYWORD:
        return graph.create_node("placeholder", f"**{parameter.name}", name=parameter.name)
    if parameter.default is parameter.empty:
        return graph.placeholder(parameter.name)
    if not isinstance(parameter.default, SIMPLE):
        raise TraceError(
            f"the default of its argument {parameter.name!r} is {parameter.default!r}, which no graph holds"
        )
    return graph.placeholder(parameter.name, default_value=parameter.default)


def call(
    function: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any], more: Mapping[str, Any] = {}
) -> Any:
    """Calls `function` with positional arguments, those by name, and further ones by name."""
    return function(*args, **given, **more)
