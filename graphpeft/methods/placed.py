"""Tensors of zeros, but for values at some places."""

from __future__ import annotations

from torch import Tensor

from graphpeft.graph.recorded import recorded


@recorded
def placed(values: Tensor, places: Tensor, size: int) -> Tensor:
    """Returns zeros, (…, size), but for values at some places.

    Args:
        values: The values, (…, n).
        places: Their places, each another one, (n,).
        size: The number of elements.
    """
    # in place, since a result of its own would copy all zeros
    return values.new_zeros(*values.shape[:-1], size).scatter_(-1, places.long().expand_as(values), values)
