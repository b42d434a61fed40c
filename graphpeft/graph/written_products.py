"""Changes of a weight that a rule's code writes as a product, which is then not computed.

    W + (P @ Q) · s, or its transpose        becomes W beside P, Q and s, see `low_rank_sum`

A rule is plain code on proxies, so the nodes of its change tell how it is made. Where the last of them is a product,
its factors are given to whatever uses the weight.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import Tensor

from graphpeft.graph.low_rank_sum import plus_product
from graphpeft.graph.recorded import as_node


class Product(NamedTuple):
    """A product of two factors, with what it is multiplied by.

    Attributes:
        first: The node of P.
        second: The node of Q.
        scales: Numbers, or nodes of such, by which it is multiplied in turn.
        is_turned: Whether its last two dimensions are exchanged, after all that.
    """

    first: Any
    second: Any
    scales: tuple[Any, ...] = ()
    is_turned: bool = False


def plus_change(weight: fx.Proxy, change: fx.Proxy) -> fx.Proxy:
    """Returns a weight with a change, in the weight's dtype; beside the change's factors, if it is a product."""
    product = product_of(change.node)
    if product is None:
        made: Any = weight
        return made + change.to(weight.dtype)
    first, second, *scales = (
        fx.Proxy(each, weight.tracer) if isinstance(each, fx.Node) else each
        for each in (product.first, product.second, *product.scales)
    )
    return as_node(_beside, weight, first, second, tuple(scales), product.is_turned)


def product_of(node: Any) -> Product | None:
    """Returns the product of whose computation a node is the end, or None."""
    if _turns(node):
        product = product_of(node.args[0])
        return None if product is None else product._replace(is_turned=not product.is_turned)
    if not isinstance(node, fx.Node) or node.op != "call_function" or len(node.args) != 2:
        return None
    first, second = node.args
    if node.target in (operator.matmul, torch.matmul):
        return Product(first, second)
    if node.target is operator.mul:
        for scaled, scale in ((first, second), (second, first)):
            product = product_of(scaled)
            # numbers that differ between columns would have to be turned, too
            if product is not None and not product.is_turned:
                return product._replace(scales=(*product.scales, scale))
    return None


def _turns(node: Any) -> bool:
    """Returns whether a node exchanges the last two dimensions."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method" and node.target == "transpose":
        return node.args[1:] in ((-2, -1), (-1, -2))
    return node.target is getattr and node.args[1:] == ("mT",)


def _beside(weight: Tensor, first: Tensor, second: Tensor, scales: tuple[Any, ...], is_turned: bool) -> Tensor:
    """Returns a weight beside a product, where that is smaller than the weight, and the weight is a stack."""
    rank, sides = first.shape[-1], weight.shape[-2:]
    is_plain = all(not isinstance(scale, Tensor) or scale.ndim == 0 for scale in scales)
    if weight.ndim < 3 or rank >= min(sides) or not is_plain or first.ndim < 2 or second.ndim < 2:
        change = first @ second
        for scale in scales:
            change = change * scale
        return weight + (change.mT if is_turned else change).to(weight.dtype)
    factors = (second.mT, first.mT) if is_turned else (first, second)
    stack = weight.shape[:-2]
    first, second = (factor.expand(*stack, *factor.shape[-2:]) for factor in factors)
    scale: Any = 1.0
    for each in scales:
        scale = scale * each
    return plus_product(weight, first, second, scale)
