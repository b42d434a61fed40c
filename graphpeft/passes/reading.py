"""Functions for passes to read an adapted graph and to replace its nodes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import fx, nn

from graphpeft.graph import ops
from graphpeft.graph.dependencies import reads_metadata_only
from graphpeft.graph.ops.reading import arguments_of
from graphpeft.graph.tags import TAG
from graphpeft.passes.products import cast_again, product


def adapted_values(graph: fx.Graph) -> list[fx.Node]:
    """Returns the nodes of adapters that replace an operation's value, in the order of the graph."""
    return [node for node in graph.nodes if TAG in node.meta and node.meta[TAG].over is not None]


class FirstProduct(NamedTuple):
    """The product of a branch's input with an adapter's matrix: dropout(h) Aᵀ.

    Attributes:
        node: The node of the product.
        kept: The node of the tensor saved for the backward: h, or the tensor that h casts.
        h: The node of h.
        A: The node of the matrix.
        transposed: Whether the matrix is stored as Aᵀ.
        dropped: The node of dropout(h), if dropout is a node of its own.
        dropout: The arguments `probability` and `training` of `product`, if dropout is part of the product.
    """

    node: fx.Node
    kept: fx.Node
    h: fx.Node
    A: fx.Node
    transposed: bool
    dropped: fx.Node | None = None
    dropout: tuple[Any, ...] = ()

    @property
    def site(self) -> str:
        """The name of the adapted operation."""
        return self.node.meta[TAG].site

    def factor(self, before: fx.Node) -> fx.Node:
        """Inserts nodes that read A in front of a node, and returns the node of A."""
        with self.node.graph.inserting_before(before):
            A = _read_again(self.A)
            return self.node.graph.call_method("t", (A,)) if self.transposed else A


def _read_again(node: fx.Node) -> fx.Node:
    again = node.graph.node_copy(node, _read_again)
    again.meta = dict(node.meta)
    return again


def first_products(graph: fx.Graph, root: nn.Module) -> list[FirstProduct]:
    """Returns the products of adapters whose input no adapter computes, except by a cast or dropout."""
    found = (_first_product(node, root) for node in graph.nodes if TAG in node.meta)
    return [each for each in found if each is not None]


def _first_product(node: fx.Node, root: nn.Module) -> FirstProduct | None:
    if node.target is product:
        args: tuple[Any, ...] = node.args
        kept, h, A, *dropout = args
        return FirstProduct(node, kept, h, A, False, None, tuple(dropout))
    op = ops.read_op(node, root)
    if not isinstance(op, ops.Linear) or op.bias is not None or node.op == "call_module":
        return None
    A = matrix_of(op)
    dropped = op.x if TAG in op.x.meta and op.x.target is F.dropout else None
    h = op.x if dropped is None else arguments_of(dropped, "input")[0]
    is_first = TAG not in h.meta or cast_from(h) is not None
    return FirstProduct(node, h, h, A, op.transposed, dropped) if is_first and TAG in A.meta else None


def matrix_of(op: ops.Linear) -> fx.Node:
    """Returns the ``get_attr`` node of a linear operation's matrix, before any transpose."""
    reading = (node for node in op.node.graph.nodes if node.op == "get_attr" and node.target == op.weight)
    return next(reading)


def cast_from(node: fx.Node) -> fx.Node | None:
    """Returns the input of a node of an adapter that casts to the dtype of a tensor; None for another node."""
    if TAG not in node.meta or node.kwargs:
        return None
    if node.target is cast_again:
        return node.args[1]  # type: ignore[return-value]
    is_cast = node.op == "call_method" and node.target == "to" and len(node.args) == 2
    dtype = node.args[1] if is_cast else None
    is_dtype = isinstance(dtype, fx.Node) and dtype.target is getattr and dtype.args[1] == "dtype"
    return node.args[0] if is_dtype else None  # type: ignore[return-value]


def is_read_by(value: fx.Node, reader: fx.Node) -> bool:
    """Returns whether `reader` alone reads the elements of a value; other nodes may read its metadata."""
    return all(user is reader or reads_metadata_only(user) for user in value.users)


def put_in_place_of(old: fx.Node, new: fx.Node) -> None:
    """Replaces all uses of `old` by `new`, copies the metadata, and erases unused nodes."""
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    erase_unused(old)


def erase_unused(node: fx.Node) -> None:
    """Erases an adapter's node without users, and then its inputs that have no users left."""
    if node.users or TAG not in node.meta or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        erase_unused(source)
