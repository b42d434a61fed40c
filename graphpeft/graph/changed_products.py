"""Products with a changed weight: one in single precision, and two where W + ΔW would round the change off.

    x (W + ΔW)ᵀ  =  x Wᵀ + x ΔWᵀ

The sum of the weights is one pass over them, however many rows x has. Each run decides, since the same graph may run on
a few rows or on many, in single precision or in half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.graph.autocast import is_in_autocast
from graphpeft.graph.recorded import identity_in_evaluation, recorded
from graphpeft.graph.scaled_sum import is_captured

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
