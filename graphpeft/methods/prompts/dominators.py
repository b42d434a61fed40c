"""The nodes of a graph that are on each way of tokens from the inputs to an attention: its query's dominators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from graphpeft._torch import pytree
from graphpeft.methods.prompts.example_values import Ran
from graphpeft.sites.dataflow import as_digraph


def dominating_nodes(ran: Ran, queries: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, set[str]]:
    """Returns for each attention the names of the nodes that are on each way of tensors from the inputs to its query.

    An attention whose query doesn't depend on the inputs is left out, such as a pooling by a parameter.

    Args:
        ran: The graph.
        queries: The node of each attention's query.
    """
    import networkx as nx

    flow = as_digraph(ran.graph)
    # a parameter that is read, or a shape that is asked for, brings no tokens
    flow.remove_nodes_from([n for n in ran.graph.nodes if n.op == "get_attr" or not _has_tensors(ran.values[n.name])])
    inputs = "the inputs"
    flow.add_edges_from((inputs, node) for node in list(flow) if node.op == "placeholder")
    immediate = nx.immediate_dominators(flow, inputs)

    def chain(node: Any) -> Iterator[str]:
        while node != inputs:
            yield node.name
            node = immediate[node]

    return {attention: set(chain(query)) for attention, query in queries.items() if query in immediate}


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
