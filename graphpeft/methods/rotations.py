"""Rotations of blocks of features, which OFT and BOFT make of skew-symmetric matrices.

Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280; and "Orthogonal
Finetuning Made Scalable", arXiv 2506.19847.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphpeft.graph import ops
from graphpeft.graph.recorded import recorded
from graphpeft.methods.skew import cayley, neumann, skew
from graphpeft.sites.site import LeafSite


@recorded
def blocks_of(
    triangles: Tensor, size: int, terms: int | None, eps: float | None, drops: float, training: bool
) -> Tensor:
    """Returns the blocks of R.

    Args:
        triangles: The upper triangles of S, of shape (…, count, size · (size − 1) / 2).
        size: The number of features of a block.
        terms: The number of terms of Neumann's series; None for the exact map.
        eps: The length to which S is shortened, see `projected`; None for any. In training, S itself is shortened.
        drops: The share of the blocks that are the identity, in training.
        training: Whether the model is trained.
    """
    if eps is not None and training:
        # the next step of training starts from there, as in PEFT
        with torch.no_grad():
            triangles.copy_(projected(triangles, eps))
    elif eps is not None:
        triangles = projected(triangles, eps)
    skewed = skew(triangles, size)
    blocks = cayley(skewed) if terms is None else neumann(skewed, terms)
    # one block in all places isn't dropped, as in PEFT
    return with_identities(blocks, drops) if drops and training and len(blocks) > 1 else blocks


def with_identities(blocks: Tensor, share: float) -> Tensor:
    """Returns blocks of which a share, chosen at random, is the identity; draws what PEFT's layer for it draws.

    Args:
        blocks: The blocks, of shape (count, size, size).
        share: The share, which is rounded down to a number of blocks.
    """
    count, size, _ = blocks.shape
    # drawn on the CPU, as PEFT does
    is_replaced = (torch.randperm(count) < int(share * count)).to(blocks.device)[:, None, None]
    return torch.where(is_replaced, torch.eye(size, dtype=blocks.dtype, device=blocks.device), blocks)


def in_blocks(x: Any, blocks: Any, size: int, positions: int = 0) -> Any:
    """Returns x times the matrix that has the blocks on its diagonal; plain code for proxies.

    Args:
        x: Of shape (…, count · size, *positions).
        blocks: Of shape (count, size, size), or (1, size, size) for one block in all places.
        size: The number of rows of a block.
        positions: The number of dimensions behind the features.
    """
    parted, behind = x.unflatten(-1 - positions, (-1, size)), "xyz"[:positions]
    return torch.einsum(f"...rk{behind},rkc->...rc{behind}", parted, blocks).flatten(-2 - positions, -1 - positions)


def weight_in_blocks(weight: Any, blocks: Any, size: int, positions: int, groups: int) -> Any:
    """Returns a layer's weight, each row of which is multiplied by the blocks; plain code for proxies.

    Args:
        weight: Of shape (…, out, in), or (out, in / groups, 1, …, 1) with as many 1 as there are positions.
        blocks: As in `rows_in_blocks`, for all groups: the first ones are for the first group's features.
        size: The number of rows of a block.
        positions: The number of dimensions of a kernel.
        groups: The number of groups of a convolution's features.
    """
    matrix = weight.flatten(1) if positions else weight
    if groups > 1:
        matrix = matrix.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1)
    turned = rows_in_blocks(matrix, blocks, size)
    if groups > 1:
        turned = turned.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    return turned.unflatten(1, (-1, *(1,) * positions)) if positions else turned


def rows_in_blocks(matrix: Any, blocks: Any, size: int) -> Any:
    """Returns a matrix, or each of a stack, times the matrix that has the blocks on its diagonal; code for proxies.

    Args:
        matrix: Of shape (…, rows, count · size).
        blocks: Of shape (…, count, size, size), or (…, 1, size, size) for one block in all places.
        size: The number of rows of a block.
    """
    return torch.einsum("...ork,...rkc->...orc", matrix.unflatten(-1, (-1, size)), blocks).flatten(-2)


def projected(triangles: Tensor, eps: float) -> Tensor:
    """Returns the triangles of the nearest matrices of which each has the norm ε / √count at most.

    Args:
        triangles: The triangles, of shape (…, count, size · (size − 1) / 2).
        eps: ε.
    """
    with torch.no_grad():  # which PEFT takes for no part of the function
        # each element is in its matrix twice
        norms = triangles.norm(dim=-1, keepdim=True) * 2**0.5
        factors = (eps / triangles.shape[-2] ** 0.5 / norms).clamp(max=1)
    return triangles * factors


def is_weight_as_such(site: Any) -> bool:
    """Returns whether a site is a weight of which no use is known that tells features from positions."""
    return not isinstance(site, LeafSite) and site.layout is ops.Weight


def features_of(site: Any) -> int:
    """Returns the number of the features that are rotated: of an embedding's rows, or of what a layer is given."""
    if is_weight_as_such(site):
        return site.matrix_shape[-1] if site.matrix_shape else 1
    is_table = not isinstance(site, LeafSite) and site.layout is ops.Embedding
    return site.out_features if is_table else site.in_features


def nearest_divisor(features: int, wanted: int) -> int:
    """Returns the divisor of a number of features that is nearest to a number; of two equally near, the smaller."""
    divisors = (number for number in range(1, features + 1) if features % number == 0)
    return min(divisors, key=lambda number: abs(number - wanted))


@recorded
def butterfly(x: Tensor, squares: Tensor, is_transposed: bool, drops: float, training: bool) -> Tensor:
    """Returns x R, or x Rᵀ.

    Args:
        x: Of shape (…, features); with a stack of rotations, of shape (…, rows, features).
        squares: The matrices of which the difference from the transposes is skew, (…, factors, count, size, size).
        is_transposed: Whether R is transposed.
        drops: The share of the blocks of one factor that are the identity, in training.
        training: Whether the model is trained.
    """
    blocks = cayley((squares - squares.mT) / 2)
    if drops and training:
        blocks = _with_identities_in_one(blocks, drops)
    if is_transposed:
        blocks = blocks.mT
    apply = in_blocks if squares.ndim == 4 else rows_in_blocks
    size, numbers = squares.shape[-1], range(squares.shape[-4])
    for number in numbers if is_transposed else reversed(numbers):
        halves = 2**number
        x = _interleaved(x, 2, halves, size) if number else x
        x = apply(x, blocks[..., number, :, :, :], size)
        x = _interleaved(x, halves, 2, size) if number else x
    return x


def _interleaved(x: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """Returns x with its half blocks, in groups of rows · columns, in the order of the columns."""
    return x.unflatten(-1, (-1, rows, columns, size // 2)).transpose(-3, -2).flatten(-4)


def _with_identities_in_one(blocks: Tensor, share: float) -> Tensor:
    """Returns blocks, (factors, count, size, size), of which a share in one factor is the identity; draws as PEFT."""
    factors, count, size, _ = blocks.shape
    is_chosen = torch.arange(factors) == torch.randint(0, factors, (1,))
    is_replaced = is_chosen[:, None] & (torch.randperm(count) < int(share * count))
    one = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
    return torch.where(is_replaced[..., None, None].to(blocks.device), one, blocks)
