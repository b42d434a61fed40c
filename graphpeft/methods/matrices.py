"""Weights as matrices (out, in): of linear layers, stacks of such, and kernels, whose positions count as inputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from graphpeft.sites.site import LeafSite


class Matrices(NamedTuple):
    """The matrices that a weight consists of.

    Attributes:
        stack: The sizes of the dimensions in front, such as the number of experts; () for one matrix.
        rows: The number of output features.
        columns: The number of input features; of a convolution, times the number of its kernel's positions.
    """

    stack: tuple[int, ...]
    rows: int
    columns: int

    @property
    def number(self) -> int:
        """The number of matrices."""
        return math.prod(self.stack)

    @property
    def size(self) -> int:
        """The number of elements of all matrices."""
        return self.number * self.rows * self.columns


def as_matrices(weight: Any, site: Any) -> Any:
    """Returns a weight in PEFT's layout as its matrices, (*stack, rows, columns)."""
    stack, rows, columns = matrices_of(site)
    return weight.reshape(*stack, rows, columns)


def matrices_of(site: Any) -> Matrices:
    """Returns the matrices of a site's weight; a vector, which most rules refuse, counts as a column."""
    if isinstance(site, LeafSite):
        return Matrices((), site.out_features, site.in_features)
    layout = site.weight_layout
    kernel, shape = layout.kernel, layout.turned_shape(site.shape)
    *stack, rows, columns = (*shape[: len(shape) - len(kernel)], *(1,) * (2 - len(shape)))
    return Matrices(tuple(stack), rows, columns * math.prod(kernel))


def svd_by_seed(weight: torch.Tensor, rank: int, steps: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Returns the first left singular vectors, singular values, and right singular vectors, as columns, by a seed.

    Args:
        weight: The matrices, (…, out, in). They are decomposed where they are, as in PEFT.
        rank: The number of vectors.
        steps: The number of steps of the random method.
        seed: Its seed; PyTorch's own generators stay as they are.
    """
    kind, devices = weight.device.type, [] if weight.device.type == "cpu" else [weight.device]
    with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
        torch.manual_seed(seed)
        return torch.svd_lowrank(weight, q=rank, niter=steps)
