"""Makes one graph for runs with and without gradients, if both answers of ``torch.is_grad_enabled()`` compute the same.

An example is ``if torch.is_grad_enabled() and self.gradient_checkpointing``. If the computations differ, the answer is
a decision, which the graph checks.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from graphpeft.graph import guards
from graphpeft.tracing.graph_equality import checks_all_of, equivalent


def decides_on_gradients(graph: fx.Graph) -> bool:
    """Returns whether `graph` asks ``torch.is_grad_enabled()``."""
    return any(map(_is_question, graph.nodes))


def serving_both(graph: fx.Graph, other: fx.Graph) -> fx.Graph | None:
    """Returns one graph for runs with and without gradients, or None if the two graphs compute different results.

    The returned graph is the input graph that has all checks of the other, less the checks of the gradient mode.
    """
    if not equivalent(graph, other, {}) or not equivalent(other, graph, {}):
        return None
    for one, another in ((graph, other), (other, graph)):
        if checks_all_of(one, another, _is_about_gradients):
            for node in reversed(one.nodes):
                if _is_question(node) or _is_about_gradients(node):
                    one.erase_node(node)
            return one
    return None


def _is_question(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.is_grad_enabled


def _is_about_gradients(node: fx.Node) -> bool:
    return node.target is guards.expect and any(map(_is_question, node.all_input_nodes))
