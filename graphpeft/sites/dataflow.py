"""The dataflow of a graph as a networkx graph, for reachability."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch.fx as fx

from graphpeft.graph.dependencies import writes

if TYPE_CHECKING:
    import networkx as nx


def as_digraph(graph: fx.Graph) -> nx.DiGraph:
    """Returns the nodes of `graph` with an edge from each value to each node that uses it."""
    import networkx as nx  # here, since its import takes a third of the time of importing this library

    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return flow


def reaching_output(graph: fx.Graph) -> set[fx.Node]:
    """Returns the nodes whose values reach the output, or a call that changes something in place."""
    found: set[fx.Node] = set()
    # a node comes after its inputs
    for node in reversed(graph.nodes):
        if node in found or node.op == "output" or (node.op.startswith("call_") and writes(node.target)):
            found.update((node, *node.all_input_nodes))
    return found


def feeding_directly(
    graph: fx.Graph, node: fx.Node, among: Collection[fx.Node], leads_on: Callable[[fx.Node], bool]
) -> list[fx.Node]:
    """Returns the nodes of `among` with a path to `node` that passes no other of them, in the order of the graph."""
    import networkx as nx

    flow = as_digraph(graph)
    flow.remove_nodes_from([other for other in graph.nodes if other is not node and not leads_on(other)])
    flow.remove_edges_from([edge for stop in among for edge in flow.in_edges([stop])])
    before = {node, *nx.ancestors(flow, node)}
    return [other for other in graph.nodes if other in before and other in among]
