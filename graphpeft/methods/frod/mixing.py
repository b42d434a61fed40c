"""The sparse mixing of FRoD: a matrix with a trained diagonal and trained elements at some places.

M = S + diag(d)        h Mᵀ
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphpeft._torch import is_transformed
from graphpeft.graph.autocast import is_in_autocast
from graphpeft.graph.recorded import recorded
from graphpeft.graph.scaled_sum import is_captured
from graphpeft.rules.products import Factor


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


@dataclass(frozen=True)
class Mixed(Factor):
    """M as a factor of a product; its attributes are the arguments of `mixed_product`."""

    diagonal: Any
    values: Any
    places: Any
    elements: Any
    starts: Any

    def applied(self, h: Any) -> Any:
        """Returns h Mᵀ."""
        return mixed_product(h, self.diagonal, self.values, self.places, self.elements, self.starts)

    def matrix(self) -> Any:
        """Returns M."""
        return mixed(self.diagonal, self.values, self.places)


class Sorted(NamedTuple):
    """The elements of M, the others before those of the diagonal, by their rows and by their columns.

    Attributes:
        elements: The numbers of the elements by their rows, and these elements' columns; then by their columns, and
            these elements' rows; (4, number + n).
        starts: Where each row begins in the first ones, and each column in the others, (2, n).
    """

    elements: Tensor
    starts: Tensor


def sorted_places(places: Tensor, size: int) -> Sorted:
    """Returns the elements of M in the order in which products take them.

    Args:
        places: The rows and the columns of the elements off the diagonal, (2, number).
        size: n.
    """
    numbers = torch.arange(size, device=places.device)
    rows, columns = torch.cat([places, numbers.expand(2, -1)], 1)
    elements, starts = [], []
    for own, others in ((rows, columns), (columns, rows)):
        order = torch.argsort(own, stable=True)
        elements += [order, others[order]]
        starts.append(torch.searchsorted(own[order], numbers))
    return Sorted(torch.stack(elements), torch.stack(starts))


@recorded
def mixed_product(
    h: Tensor, diagonal: Tensor, values: Tensor, places: Tensor, elements: Tensor, starts: Tensor
) -> Tensor:
    """Returns h Mᵀ, and saves no matrix of M's size for the backward.

    Args:
        h: The input, (…, n).
        diagonal: The elements of the diagonal, (n,).
        values: The others, (number,).
        places: Their rows and columns, (2, number).
        elements: The elements by their rows and by their columns, see `sorted_places`.
        starts: Where these begin, likewise.
    """
    # compilers choose themselves what to save; torch.func has no rule for a Function
    if is_captured() or is_transformed():
        return F.linear(h, mixed(diagonal, values, places))
    made: Any = _MixedProduct.apply(h, diagonal, values, places, elements, starts)
    return made


class _MixedProduct(torch.autograd.Function):
    """The product with a backward of differentiable operations, so that higher-order gradients work."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, diagonal: Tensor, values: Tensor, places: Tensor, *order: Tensor) -> Tensor:
        """Returns the product."""
        ctx.save_for_backward(h, diagonal, values, places, *order)
        if _is_by_elements(h, diagonal, values):
            return _by_elements(h, torch.cat([values, diagonal]), order[0][:2], order[1][0])
        return F.linear(h, mixed(diagonal, values, places))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the input, of the diagonal and of the other elements."""
        h, diagonal, values, places, elements, starts = ctx.saved_tensors
        # under autocast, the product is of another dtype than the elements
        dtype = functools.reduce(torch.promote_types, (h.dtype, diagonal.dtype, gradients[0].dtype))
        h, gradient = h.to(dtype), gradients[0].to(dtype)
        # gradients are recorded here if there are to be gradients of these, which sums of rows don't have
        if not torch.is_grad_enabled() and _is_by_elements(gradient, diagonal, values):
            of_input = _by_elements(gradient, torch.cat([values, diagonal]), elements[2:], starts[1])
            of_elements = _gradients_of_elements(h, gradient, elements[:2], starts[0])
            of_values, of_diagonal = of_elements.split([values.numel(), diagonal.numel()])
            return of_input, of_diagonal, of_values, None, None, None
        of_input = gradient @ mixed(diagonal, values, places).to(dtype)
        # without flatten, which has no rule for batched gradients, and needs two dimensions
        size = h.shape[-1]
        of_matrix = gradient.reshape(-1, size).mT @ h.reshape(-1, size)
        return of_input, of_matrix.diagonal(), of_matrix[places[0], places[1]], None, None, None


_FEW = 1 / 8
"""The share of the places of M up to which a product by elements takes no longer than one with all of M, about."""


def _is_by_elements(h: Tensor, diagonal: Tensor, values: Tensor) -> bool:
    """Returns whether a product is to be a sum of rows for each element, which half precision would round."""
    is_plain = h.dtype == values.dtype == diagonal.dtype and h.dtype.itemsize >= 4 and not is_transformed()
    is_few = values.numel() + diagonal.numel() <= _FEW * diagonal.numel() ** 2
    return is_plain and is_few and not is_in_autocast(h.device.type)


def _by_elements(h: Tensor, values: Tensor, in_order: Tensor, starts: Tensor) -> Tensor:
    """Returns h Mᵀ as sums of rows of hᵀ.

    Args:
        h: The input, (…, n).
        values: The elements of M, (number,).
        in_order: Their numbers by the rows of M, and their columns, (2, number).
        starts: Where each row begins, (n,).
    """
    order, columns = in_order
    return _summed(_turned(h), values[order], columns, starts).t().reshape(h.shape)


def _gradients_of_elements(h: Tensor, gradient: Tensor, in_order: Tensor, starts: Tensor) -> Tensor:
    """Returns the gradients of the elements of M, of which those at other places aren't computed.

    Args:
        h: The input, (…, n).
        gradient: The gradient of h Mᵀ, (…, n).
        in_order: As in `_by_elements`.
        starts: Likewise.
    """
    order, columns = in_order
    with torch.enable_grad():
        values = h.new_zeros(order.shape, requires_grad=True)
        made = _summed(_turned(h.detach()), values, columns, starts)
    (found,) = torch.autograd.grad(made, values, _turned(gradient))
    return torch.empty_like(found).index_copy_(0, order, found)


def _turned(h: Tensor) -> Tensor:
    """Returns a copy of hᵀ, (n, rows)."""
    return h.reshape(-1, h.shape[-1]).t().contiguous()


def _summed(rows: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    return F.embedding_bag(columns, rows, starts, mode="sum", per_sample_weights=values)
