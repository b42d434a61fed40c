"""Skew-symmetric matrices, and the rotations that are made of them.

    Q = (1 − S)(1 + S)⁻¹                            Cayley's map of a skew S = −Sᵀ
    Q ≈ 1 + 2 S + 2 S² + … + 2 Sⁿ⁻² + Sⁿ⁻¹          Neumann's series, of Cayley's map of −S

Source: Qiu et al., "Orthogonal Finetuning Made Scalable", arXiv 2506.19847.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from graphpeft._torch import is_transformed
from graphpeft.graph.hosts.sharding import in_all
from graphpeft.graph.scaled_sum import add_scaled, is_captured


def skew(triangles: Tensor, size: int) -> Tensor:
    """Returns the skew-symmetric matrices, (…, size, size), of which these are the upper triangles.

    Args:
        triangles: The elements above the diagonals, row after row, of shape (…, size · (size − 1) / 2).
        size: The number of rows of a matrix.
    """
    # a matrix of one row has an empty triangle
    flat = triangles.reshape(prod(triangles.shape[:-1]), triangles.shape[-1])
    # torch.func has no rule for a Function, and a compiler chooses itself what to save
    made: Any = _skewed(flat, size) if is_captured() or is_transformed() else _Skewed.apply(flat, size)
    return made.unflatten(0, triangles.shape[:-1]) if triangles.ndim > 1 else made[0]


def _skewed(flat: Tensor, size: int) -> Tensor:
    rows, columns = _upper_places(flat, size)
    upper = flat.new_zeros(len(flat), size, size)
    upper[:, rows, columns] = flat
    return upper - upper.mT


def _upper_places(beside: Tensor, size: int) -> Any:
    """Returns the rows and the columns of the places above the diagonal."""
    return in_all(torch.triu_indices(size, size, 1, device=beside.device), beside)


class _Skewed(torch.autograd.Function):
    """The skew-symmetric matrices, whose places aren't saved for the backward, but counted again."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, size: int) -> Tensor:
        """Returns the matrices."""
        ctx.size = size
        return _skewed(flat, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the triangles."""
        rows, columns = _upper_places(gradients[0], ctx.size)
        return (gradients[0] - gradients[0].mT)[..., rows, columns], None


def cayley(skewed: Tensor) -> Tensor:
    """Returns Cayley's map of skew-symmetric matrices; in half precision, it is computed in single.

    Args:
        skewed: The matrices, of shape (…, size, size).
    """
    wide = skewed.to(torch.promote_types(skewed.dtype, torch.float32))
    one = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    return torch.linalg.solve(one + wide, one - wide, left=False).to(skewed.dtype)


def neumann(skewed: Tensor, terms: int) -> Tensor:
    """Returns Neumann's series for Cayley's map of the negative matrices.

    Args:
        skewed: The matrices, of shape (…, size, size).
        terms: The number of terms. Four are the same as three, as in PEFT.
    """
    made = torch.eye(skewed.shape[-1], dtype=skewed.dtype, device=skewed.device).expand_as(skewed)
    if terms > 1:
        made = add_scaled(made, skewed, 2)
    if terms > 2:
        power = skewed @ skewed
        made = add_scaled(made, power, 2)
        for _ in range(3, terms - 1):
            power = power @ skewed
            made = add_scaled(made, power, 2)
        made = made + power @ skewed
    return made
