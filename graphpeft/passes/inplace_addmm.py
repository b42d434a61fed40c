"""Adds a branch's last product to an operation's value in place.

    y + s · (d Bᵀ)    becomes    y.addmm_(d, Bᵀ, alpha=s)

so that neither the product nor the sum needs memory. This requires that y is the output of a linear operation, that no
other node reads y, and that the operation's gradient doesn't need y. In half precision the original form rounds the
product before the addition, so this pass keeps the product, and makes only the sum in place.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphpeft._torch import has_hooks_of_all
from graphpeft.graph import ops
from graphpeft.graph.autocast import HALVES
from graphpeft.graph.ops.patched import as_patched
from graphpeft.graph.recorded import recorded
from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.graph.tags import TAG
from graphpeft.passes.outcome import Outcome
from graphpeft.passes.plain_form import wants_plain_form
from graphpeft.passes.reading import adapted_values, is_read_by, matrix_of, put_in_place_of


def inplace_addmm(graph: fx.Graph, root: nn.Module) -> list[Outcome]:
    """Makes the sums of linear operations' outputs and branches in place."""
    return [Outcome(total.meta[TAG].site, _made_in_place(graph, total, root)) for total in adapted_values(graph)]


def _made_in_place(graph: fx.Graph, total: fx.Node, root: nn.Module) -> str | None:
    """Makes one sum in place, or returns the reason to leave it."""
    y, addend, scaling = _summands(total)
    product = ops.read_op(addend, root) if isinstance(addend, fx.Node) else None
    if not isinstance(y, fx.Node) or not isinstance(product, ops.Linear) or product.bias is not None:
        return "the adapted value isn't a sum of the operation's value and a product"
    if not _is_fresh(y, root):
        return "the product isn't added to a new output of a linear operation"
    if not is_read_by(y, total):
        return "others read the operation's value, too"
    if not is_read_by(product.node, total):
        return "others read the product, too"
    with graph.inserting_before(total):
        B = matrix_of(product)
        B = graph.call_method("t", (B,)) if product.transposed else B
        if y.op == "call_module":
            layer = graph.create_node("get_attr", str(y.target))
            made = graph.call_function(add_product_unless_kept_, (y, product.x, B, scaling, layer))
        else:
            made = graph.call_function(add_product_, (y, product.x, B, scaling))
    put_in_place_of(total, made)
    return None


def _summands(total: fx.Node) -> tuple[Any, Any, Any]:
    """Returns both terms of a sum and the factor of the second term; three times None for another node."""
    if total.target is add_scaled:
        return total.args  # type: ignore[return-value]
    if total.target in (torch.add, operator.add) and len(total.args) == 2 and not total.kwargs:
        return *total.args, 1
    return None, None, None


def _is_fresh(y: fx.Node, root: nn.Module) -> bool:
    """Returns whether `y` is a new tensor that the gradient of its operation doesn't need."""
    if y.target is as_patched:
        return False  # the code of somebody else may keep it
    return y.target in (add_product_, add_product_unless_kept_) or isinstance(ops.read_op(y, root), ops.Linear)


@recorded
def add_product_(y: Tensor, d: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Returns y + s d Bᵀ, in the memory of y if its dtype can hold the sum.

    Args:
        y: Of shape (…, out); may be overwritten.
        d: Of shape (…, r).
        B: Of shape (out, r).
        scaling: s.
    """
    if wants_plain_form():
        return add_scaled(y, F.linear(d, B), scaling)
    dtype = y.dtype
    if dtype == d.dtype == B.dtype and dtype not in HALVES:
        if y.ndim == 2:
            return y.addmm_(d, B.t(), alpha=scaling)
        if y.ndim == 3:
            # instead of addmm_ on a view of y, since autograd copies the gradient for each write into a view
            return y.baddbmm_(d, B.t().expand(d.shape[0], -1, -1), alpha=scaling)
    product = F.linear(d, B)
    if torch.promote_types(dtype, product.dtype) != dtype:
        return add_scaled(y, product, scaling)
    # the sum of add_scaled in place, since nothing records operators here
    return y.add_(product, alpha=scaling)


@recorded
def add_product_unless_kept_(y: Tensor, d: Tensor, B: Tensor, scaling: float, layer: nn.Module) -> Tensor:
    """Returns y + s d Bᵀ for the output y of a layer: in a new tensor if the layer has hooks, which may have kept y."""
    if _has_hooks(layer):
        return add_scaled(y, F.linear(d, B), scaling)
    return add_product_(y, d, B, scaling)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks) or has_hooks_of_all()
