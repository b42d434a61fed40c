"""The boundary of a module's forward, where adapters change its inputs and its output.

The module needs no trace for this: its graph has the forward's arguments and calls the forward. In a flat graph, the
nodes recorded in one call of the module are the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.fx as fx

from graphpeft.graph.calls import Call, calls_of
from graphpeft.graph.errors import TraceError
from graphpeft.graph.tags import TAG

NAME = "(forward)"
"""The name of the boundary of a whole graph, in sites and tags."""


@dataclass(frozen=True)
class Boundary:
    """The boundary of a whole graph's forward, or of a call that was inlined into a graph.

    Attributes:
        name: The boundary's name in sites and tags.
        arguments: The names of the forward's arguments.
        inputs: The present node of each argument that is a value of the graph, by the argument's name.
        output: The node of the returned value, before the boundary's own adapters.
        inside: The nodes between inputs and output, without nodes of the boundary's own adapters.
        around: The calls around it, outermost first.
    """

    name: str
    arguments: tuple[str, ...]
    inputs: Mapping[str, fx.Node]
    output: fx.Node
    inside: frozenset[fx.Node]
    around: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Leaf(Boundary):
    """The boundary of an opaque module: one operation from the first argument to the output."""

    transposed = False

    @property
    def x(self) -> fx.Node:
        """The present node of the first argument."""
        return self.inputs[self.arguments[0]]

    @property
    def node(self) -> fx.Node:
        """The node whose value the call returns."""
        return self.output


def leaf_of(graph: fx.Graph, name: str) -> Leaf:
    """Returns the call with the boundary `name` as one operation; raises as `boundary_of` does."""
    return Leaf(**vars(boundary_of(graph, name)))


def boundary_of(graph: fx.Graph, name: str) -> Boundary:
    """Returns the boundary of `graph` with this name."""
    return _of_graph(graph) if name == NAME else _of_call(graph, name)


def boundaries_inside(graph: fx.Graph, path: str) -> tuple[str, ...]:
    """Returns the names of the boundaries of all calls of the module at `path` that were inlined into `graph`."""
    return tuple(dict.fromkeys(call.name for node in graph.nodes for call in calls_of(node) if call.path == path))


def _of_graph(graph: fx.Graph) -> Boundary:
    own = [node for node in graph.nodes if not _is_adapters_of(node, NAME)]
    inside = frozenset(node for node in own if node.op not in ("placeholder", "output"))
    placeholders = {str(node.target).lstrip("*"): node for node in own if node.op == "placeholder"}
    nodes = {node.name: node for node in graph.nodes}
    output = graph.output_node().args[0]
    if not isinstance(output, fx.Node):
        raise TraceError("its graph returns a container of values, where an adapter needs one value")
    while _is_adapters_of(output, NAME):
        output = nodes[output.meta[TAG].over]
    if output.op == "placeholder":
        raise TraceError("it returns what it is given")
    return Boundary(NAME, tuple(placeholders), _as_given(graph, placeholders, inside), output, inside)


def _of_call(graph: fx.Graph, name: str) -> Boundary:
    chains = [calls_of(node) for node in graph.nodes]
    found = ((call, chain[:depth]) for chain in chains for depth, call in enumerate(chain) if call.name == name)
    call, around = next(found, (None, ()))
    if call is None:
        raise TraceError(f"the graph was exchanged, and has nothing of the call {name}")
    inside = frozenset(node for node in graph.nodes if call in calls_of(node) and not _is_adapters_of(node, name))
    nodes = {node.name: node for node in graph.nodes}
    first, *others = [nodes.get(node) for node in call.returned if node is not None] or [None]
    if first is None or first not in inside:
        raise TraceError("what it returns isn't a value that it has computed")
    for other in others:
        if other is not None and any(user not in inside for user in other.users):
            raise TraceError(f"it returns more than one value: {other.name} is used, too")
    output = first
    while (over := _over(graph, output, inside.__contains__)) is not None:
        output = over
    given = {argument: nodes[node] for argument, node in call.arguments.items() if node in nodes}
    if len(set(given.values())) < len(given):
        raise TraceError(
            f"one value is given as several of its arguments ({', '.join(given)}), which its graph doesn't tell apart; "
            "adapt the model itself"
        )
    return Boundary(name, tuple(call.arguments), _as_given(graph, given, inside), output, inside, around)


def _is_adapters_of(node: fx.Node, name: str) -> bool:
    """Returns whether `node` is an adapter's at the boundary `name`."""
    return TAG in node.meta and node.meta[TAG].site == name


def _over(graph: fx.Graph, node: fx.Node, counts: Callable[[fx.Node], bool]) -> fx.Node | None:
    """Returns the adapter's node that replaces the value of `node`, among the nodes that `counts` accepts."""
    over = (other for other in graph.nodes if TAG in other.meta and other.meta[TAG].over == node.name)
    return next(filter(counts, over), None)


def _given_for(graph: fx.Graph, node: fx.Node, counts: Callable[[fx.Node], bool]) -> fx.Node | None:
    """Returns the adapter's node that replaces `node` as a value or an input, among the nodes that `counts` accepts."""
    given = (other for other in graph.nodes if TAG in other.meta and other.meta[TAG].stands_for == node.name)
    return next(filter(counts, given), None)


def _as_given(graph: fx.Graph, given: Mapping[str, fx.Node], inside: frozenset[fx.Node]) -> dict[str, fx.Node]:
    """Returns the nodes that the nodes `inside` use for the arguments, after other adapters' replacements."""

    def reaches(node: fx.Node) -> bool:
        return not inside.isdisjoint(node.users) or _given_for(graph, node, reaches) is not None

    def seen(node: fx.Node) -> fx.Node:
        given = _given_for(graph, node, reaches) if inside.isdisjoint(node.users) else None
        return node if given is None else seen(given)

    return {name: seen(node) for name, node in given.items()}
