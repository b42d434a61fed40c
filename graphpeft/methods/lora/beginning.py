"""What the first values of A and B are made from, where they aren't random alone, and what makes them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Beginning(NamedTuple):
    """What first values are made from.

    Attributes:
        weight: W, in single precision at least.
        rank: The rank.
        scaling: The scale of the branch.
        drawn: A as ``nn.Linear`` draws it.
        module: The module that has the weight.
        config: The config.
    """

    weight: Tensor
    rank: int
    scaling: float
    drawn: Tensor
    module: nn.Module
    config: Any


class First(NamedTuple):
    """First values.

    Attributes:
        A: Of shape (r, in).
        B: Of shape (out, r).
        left: The weight that is read in the place of W, of its shape; None for W itself.
    """

    A: Tensor
    B: Tensor
    left: Tensor | None = None


class Initialisation(Protocol):
    """How A and B get their first values, where these aren't random alone."""

    @property
    def replaces_weight(self) -> bool:
        """Whether another weight is read in the place of W."""
        ...

    @property
    def takes_product(self) -> bool:
        """Whether that is W without s B A, so that both together are W."""
        ...

    @property
    def is_measured(self) -> bool:
        """Whether it needs what is measured on a layer while the model runs."""
        ...

    @property
    def b_is_trained(self) -> bool:
        """Whether B is trained."""
        ...

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Returns the reason why a weight of this shape can't be the beginning, or None."""
        ...

    def first(self, given: Beginning) -> First:
        """Returns A, B and what is left of the weight."""
        ...


def taken_from(given: Beginning, A: Tensor, B: Tensor) -> First:
    """Returns first values that are taken from the weight: what is left is W − s B A."""
    return First(A, B, given.weight - given.scaling * B @ A)


def refused_rank(shape: tuple[int, int], rank: int) -> str | None:
    """Returns the reason why a weight of this shape has no `rank` directions, or None."""
    if rank <= min(shape):
        return None
    return f"its rank is {min(shape)} at most, and r is {rank}; choose a smaller one"
