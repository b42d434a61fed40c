"""Finds the attentions of a graph: attention layers, functions with such a name, and softmaxes of products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.fx as fx
from torch import Tensor, nn

LAYERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Layers that are attentions, or contain attentions."""

_PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm", "__matmul__")


class Attention(NamedTuple):
    """An attention in a graph.

    Attributes:
        node: The node that computes the attention, or its softmax.
        query: The node of the queries.
        key: The node of the keys; None if it isn't found.
        value: The node of the values; None if it isn't found.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node | None
    value: fx.Node | None


def attentions(root: nn.Module, graph: fx.Graph, values: Mapping[str, Any]) -> list[Attention]:
    """Returns all attentions of a graph."""
    found = (_attention(node, root, values) for node in graph.nodes)
    return [attention for attention in found if attention is not None]


def _attention(node: fx.Node, root: nn.Module, values: Mapping[str, Any]) -> Attention | None:
    layer = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(layer, LAYERS) or _name(node).endswith(("attention", "multi_head_attention_forward")):
        query, key, value = (_argument(node, place, name) for place, name in enumerate(("query", "key", "value")))
        return Attention(node, query, key, value) if query is not None else None
    is_softmax = isinstance(layer, nn.Softmax) or _name(node) == "softmax"
    return _of_products(node, values) if is_softmax else None


def _argument(node: fx.Node, place: int, name: str) -> fx.Node | None:
    given = node.args[place] if len(node.args) > place else node.kwargs.get(name)
    return given if isinstance(given, fx.Node) else None


def _of_products(softmax: fx.Node, values: Mapping[str, Any]) -> Attention | None:
    """Returns the attention of `softmax`, if its input is a product of scores, maybe scaled and masked."""
    scores = _product(softmax.all_input_nodes, lambda node: node.all_input_nodes, softmax, values)
    if scores is None:
        return None
    query, *others = scores.all_input_nodes
    summed = _product(list(softmax.users), lambda node: list(node.users), softmax, values, is_any_shape=True)
    value = next((node for node in summed.all_input_nodes[1:]), None) if summed is not None else None
    return Attention(softmax, query, others[0] if others else None, value)


def _product(
    waiting: list[fx.Node],
    further: Callable[[fx.Node], list[fx.Node]],
    softmax: fx.Node,
    values: Mapping[str, Any],
    is_any_shape: bool = False,
) -> fx.Node | None:
    """Returns the first product reached from a softmax through nodes with a value for each pair of tokens."""
    pairs = values[softmax.name].shape[-2:]
    waiting = list(waiting)
    while waiting:
        node = waiting.pop()
        value = values.get(node.name)
        is_of_pairs = isinstance(value, Tensor) and value.shape[-2:] == pairs
        if _name(node) in _PRODUCTS and (is_any_shape or is_of_pairs):
            return node
        if is_of_pairs:
            waiting += further(node)
    return None


def _name(node: fx.Node) -> str:
    """Returns the name of the function or method that `node` calls."""
    if node.op == "call_function":
        return getattr(node.target, "__name__", "")
    return str(node.target) if node.op == "call_method" else ""
