"""The sparse mixing of FRoD: a matrix with a trained diagonal and trained elements at some places.

M = S + diag(d)        h Mᵀ
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphpeft._torch import is_transformed
from graphpeft.graph.recorded import recorded
from graphpeft.graph.scaled_sum import is_captured


@recorded
def mixed(diagonal: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """Returns a matrix, or a stack of these, with elements on its diagonal, and at some places, where they add up.

    Args:
        diagonal: The elements of the diagonal, (…, n).
        values: The others, (…, number).
        places: Their rows and columns, (2, number).
    """
    size = diagonal.shape[-1]
    ends = torch.arange(size, device=diagonal.device) * (size + 1)
    elements = torch.cat([values, diagonal], -1)
    flat = torch.cat([places[0] * size + places[1], ends]).expand_as(elements)
    # in place, since a result of its own would copy all zeros
    return (
        elements.new_zeros(*elements.shape[:-1], size * size)
        .scatter_add_(-1, flat, elements)
        .unflatten(-1, (size, size))
    )


@recorded
def mixed_product(h: Tensor, diagonal: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """Returns h Mᵀ, and saves no matrix of M's size for the backward.

    Args:
        h: The input, (…, n).
        diagonal: The elements of the diagonal, (n,).
        values: The others, (number,).
        places: Their rows and columns, (2, number).
    """
    # compilers choose themselves what to save; torch.func has no rule for a Function
    if is_captured() or is_transformed():
        return F.linear(h, mixed(diagonal, values, places))
    made: Any = _MixedProduct.apply(h, diagonal, values, places)
    return made


class _MixedProduct(torch.autograd.Function):
    """The product with a backward of differentiable operations, so that higher-order gradients work."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, diagonal: Tensor, values: Tensor, places: Tensor) -> Tensor:
        """Returns the product."""
        ctx.save_for_backward(h, diagonal, values, places)
        return F.linear(h, mixed(diagonal, values, places))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the input, of the diagonal and of the other elements."""
        h, diagonal, values, places = ctx.saved_tensors
        # under autocast, the product is of another dtype than the elements
        dtype = functools.reduce(torch.promote_types, (h.dtype, diagonal.dtype, gradients[0].dtype))
        h, gradient = h.to(dtype), gradients[0].to(dtype)
        of_input = gradient @ mixed(diagonal, values, places).to(dtype)
        # without flatten, which has no rule for batched gradients, and needs two dimensions
        size = h.shape[-1]
        of_matrix = gradient.reshape(-1, size).mT @ h.reshape(-1, size)
        return of_input, of_matrix.diagonal(), of_matrix[places[0], places[1]], None
