"""Operations in a normal form, independent of their spelling in the graph, which rules work with."""

from __future__ import annotations

import operator

import torch.fx as fx
from torch import nn

from graphpeft.graph.dependencies import reads_metadata_only
from graphpeft.graph.ops import convolution, embedding, linear
from graphpeft.graph.ops.convolution import Convolution
from graphpeft.graph.ops.embedding import Embedding
from graphpeft.graph.ops.linear import Linear, transpose_of
from graphpeft.graph.ops.patched import function_of
from graphpeft.graph.ops.weight import Weight
from graphpeft.graph.own_tensors import base_tensor
from graphpeft.graph.tags import TAG

__all__ = [
    "Computation",
    "Convolution",
    "Embedding",
    "Linear",
    "Operation",
    "Weight",
    "find_ops",
    "other_uses",
    "read_op",
    "reads",
    "weight_at",
]

Computation = Linear | Convolution | Embedding
"""A computation with a weight, of one of the known kinds."""

Operation = Computation | Weight
"""A computation with a weight, or the weight as such."""

_KINDS = (linear, convolution, embedding)


def find_ops(graph: fx.Graph, root: nn.Module) -> list[Computation]:
    """Returns the operations of `graph` whose weights are tensors of `root`, in the order of the graph."""
    found = (read_op(node, root) for node in graph.nodes if TAG not in node.meta)
    return [op for op in found if op is not None]


def read_op(node: fx.Node, root: nn.Module) -> Computation | None:
    """Returns the operation that `node` computes, or None if it is of no known kind."""
    op = _spelled(node, root)
    # a product with a batch of matrices is spelled like one with a matrix; only the weight's dimensions differ
    if op is None:
        return None
    around, _, name = op.weight.rpartition(".")
    owner = operator.attrgetter(around)(root) if around else root
    weight = owner._parameters.get(name)
    return op if op.describes((base_tensor(owner, name) if weight is None else weight).ndim) else None


def _spelled(node: fx.Node, root: nn.Module) -> Computation | None:
    if node.op == "call_module":
        return next((op for kind in _KINDS if (op := kind.of_module(node, root)) is not None), None)
    if node.op == "call_function":
        readers = [kind.FUNCTIONS.get(function_of(node)) for kind in _KINDS]
    elif node.op == "call_method":
        readers = [kind.METHODS.get(str(node.target)) for kind in _KINDS]
    else:
        return None
    reader = next((reader for reader in readers if reader is not None), None)
    return reader(node) if reader is not None else None


def weight_at(node: fx.Node) -> Weight | None:
    """Returns the weight that `node` reads, or None."""
    return Weight(node, str(node.target)) if node.op == "get_attr" else None


def reads(graph: fx.Graph, path: str) -> list[Weight]:
    """Returns the places where `graph` reads the tensor at `path` directly, not by a call of its module.

    Uses by adapters' nodes don't count, here and in `other_uses`.
    """
    own = (node for node in graph.nodes if TAG not in node.meta)
    return [Weight(node, path) for node in own if node.op == "get_attr" and node.target == path]


def other_uses(graph: fx.Graph, path: str, operations: list[Computation]) -> list[str]:
    """Returns the names of the other functions in `graph` that use the tensor at `path`, besides these operations."""
    inputs = {op.node: op.x for op in operations}
    found: list[str] = []
    waiting = [place.node for place in reads(graph, path)]
    while waiting:
        weight = waiting.pop()
        for user in filter(lambda user: TAG not in user.meta, weight.users):
            if transpose_of(user) is not None:
                waiting.append(user)
            # an operation may have its own weight as its input, too
            elif inputs.get(user, weight) is weight and not reads_metadata_only(user):
                found.append(getattr(user.target, "__name__", str(user.target)))
    return found
