"""Computes a linear operation and its branches on one matrix of rows.

    y = x Wᵀ + b + s · x Aᵀ Bᵀ    with x of shape (…, in)
    becomes the same for x as a matrix (rows, in), and the result as (…, out)

For an input with more than two dimensions, PyTorch reshapes the input to a matrix and the output back in each product,
in the forward and in the backward. This pass reshapes once. Branches that draw random numbers don't change, since the
mask of a dropout depends on the memory layout of its input.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphpeft.graph import ops
from graphpeft.graph.dependencies import reads_metadata_only
from graphpeft.graph.recorded import recorded
from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.graph.tags import TAG
from graphpeft.passes.outcome import Outcome
from graphpeft.passes.plain_form import wants_plain_form
from graphpeft.passes.reading import adapted_values


def flattened_rows(graph: fx.Graph, root: nn.Module) -> list[Outcome]:
    """Makes linear operations in a graph, and their branches, compute on matrices."""
    adapted = {value.meta[TAG].site for value in adapted_values(graph)}
    matrices: dict[fx.Node, fx.Node] = {}
    return [Outcome(node.name, _flattened(graph, node, root, matrices)) for node in graph.nodes if node.name in adapted]


def _flattened(graph: fx.Graph, y: fx.Node, root: nn.Module, matrices: dict[fx.Node, fx.Node]) -> str | None:
    """Flattens one operation, or returns the reason to leave it."""
    op = ops.read_op(y, root)
    if not isinstance(op, ops.Linear) or y.target is not F.linear:
        return "the graph doesn't compute it by F.linear"
    branch = [node for node in graph.nodes if TAG in node.meta and node.meta[TAG].site == y.name]
    if not all(_is_by_row(node, root) for node in branch):
        return "its branch is more than casts, products and sums"
    inside = {y, *branch}
    last = [node for node in inside if not node.users.keys() <= inside]
    if len(last) != 1:
        return "others read values of its branch, too"
    users = [user for user in last[0].users if user not in inside]
    if op.x not in matrices:
        with graph.inserting_before(y):
            matrices[op.x] = graph.call_function(as_rows, (op.x,))
    for node in inside - {user for user in op.x.users if reads_metadata_only(user)}:
        node.replace_input_with(op.x, matrices[op.x])
    with graph.inserting_after(last[0]):
        shaped = graph.call_function(in_shape_of, (last[0], op.x))
    for user in users:
        user.replace_input_with(last[0], shaped)
    return None


def _is_by_row(node: fx.Node, root: nn.Module) -> bool:
    """Returns whether a node of a branch computes each row of its value from the same row of its inputs."""
    if node.op == "get_attr" or reads_metadata_only(node) or isinstance(ops.read_op(node, root), ops.Linear):
        return True
    if node.target in (add_scaled, torch.add, operator.add):
        # a parameter may broadcast along a dimension that flattening removes
        return all(source.op != "get_attr" for source in node.args[:2] if isinstance(source, fx.Node))
    return node.op == "call_method" and node.target == "to"


@recorded
def as_rows(x: Tensor) -> Tensor:
    """Returns x of shape (…, in) as a matrix of shape (rows, in); x itself if it has at most two dimensions."""
    return x if x.ndim <= 2 or wants_plain_form() else x.flatten(0, -2)


@recorded
def in_shape_of(y: Tensor, x: Tensor) -> Tensor:
    """Returns y of shape (rows, out) in the shape (…, out), for x of shape (…, in)."""
    return y if y.ndim == x.ndim else y.view(*x.shape[:-1], y.shape[-1])
