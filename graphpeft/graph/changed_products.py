"""Products with a changed weight: one in single precision, and two where W + ΔW would round the change off.

    x (W + ΔW)ᵀ  =  x Wᵀ + x ΔWᵀ

The sum of the weights is one pass over them, however many rows x has. Each run decides, since the same graph may run on
a few rows or on many, in single precision or in half.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.autocast import is_in_autocast
from graphpeft.graph.recorded import identity_in_evaluation, recorded
from graphpeft.graph.scaled_sum import add_scaled, is_captured

_FEW_ROWS = 16
"""Up to about this number of rows, a second product is no slower than the sum W + ΔW."""


@recorded
def is_apart(x: Tensor, weight: Tensor) -> bool:
    """Returns whether products with W and with ΔW are to be two.

    Args:
        x: The input of the product, (…, in).
        weight: W.
    """
    # a compiler or an exporter would hold on to what this call's rows and dtypes decide
    if is_captured() or type(weight) not in (Tensor, nn.Parameter):
        return True
    # in half precision, W + ΔW is W where ΔW is small
    if weight.dtype.itemsize < 4 or is_in_autocast(weight.device.type) or _rounds_single_precision():
        return True
    return x.numel() <= _FEW_ROWS * x.shape[-1]


def _rounds_single_precision() -> bool:
    """Returns whether products of float32 numbers round them first, to TF32 or bfloat16."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return torch.get_float32_matmul_precision() != "highest"
    # the older settings set these, too, and can't be asked where both were used
    places = (backends, backends.cuda.matmul, backends.mkldnn.matmul)
    return any(place.fp32_precision in _ROUNDED for place in places)


_ROUNDED = frozenset({"tf32", "bf16"})


@identity_in_evaluation
@recorded
def apart_in_training(apart: bool, training: bool) -> bool:
    """Returns whether products are to be two, which they always are in training."""
    return apart or training


@recorded
def with_change(apart: bool, weight: Tensor, change: Tensor) -> Tensor:
    """Returns W + ΔW, or W for two products."""
    return weight if apart else weight + change


@recorded
def plus_branch(y: Tensor, branch: Tensor | None) -> Tensor:
    """Returns y + the branch, or y where there is no branch."""
    return y if branch is None else y + branch


# rows of a batch with matrices of their own


def products_by_row(y: Tensor, h: Tensor, first: Tensor, second: Tensor | None, scaling: Any) -> Tensor:
    """Returns y + s · h · first · second, with other matrices for each row.

    Args:
        y: Of shape (rows, …, out).
        h: Of shape (rows, …, in).
        first: Of shape (rows, in, r).
        second: Of shape (rows, r, out); None for one matrix alone.
        scaling: A number, or one for each row.
    """
    down = torch.bmm(h.reshape(h.shape[0], -1, h.shape[-1]), first)
    if isinstance(scaling, Tensor):
        down, scaling = down * scaling.to(down).view(-1, 1, 1), 1
    flat = y.reshape(y.shape[0], -1, y.shape[-1])
    if second is None:
        return add_scaled(flat, down, scaling).view(y.shape)
    if flat.dtype == down.dtype:
        return torch.baddbmm(flat, down, second, alpha=scaling).view(y.shape)
    return add_scaled(flat, torch.bmm(down, second), scaling).view(y.shape)


def dropped_by_row(h: Tensor, probability: Any) -> Tensor:
    """Returns `h`, (rows, …), with elements dropped, by one probability or by one for each row; 0 drops none."""
    if not isinstance(probability, Tensor):
        return F.dropout(h, probability)
    kept = 1 - probability.to(h).view(-1, *(1 for _ in h.shape[1:]))
    return h * torch.bernoulli(kept.expand_as(h)) / kept
