"""The base class of initialisations that compute the first values of A and B, where these aren't random alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn


class InitialFactors(NamedTuple):
    """First values.

    Attributes:
        A: Of shape (r, in).
        B: Of shape (out, r).
        residual: The frozen weight, (out, in), that is read in place of W; None for W itself.
    """

    A: Tensor
    B: Tensor
    residual: Tensor | None = None


class InitContext(NamedTuple):
    """The input of an initialisation at one weight.

    Attributes:
        weight: W, (out, in), in single precision at least.
        rank: The rank r.
        scaling: The scale s of the branch.
        drawn: A, (r, in), as ``nn.Linear`` draws it.
        module: The module that has the weight.
        config: The config.
    """

    weight: Tensor
    rank: int
    scaling: float
    drawn: Tensor
    module: nn.Module
    config: Any

    def subtracting(self, A: Tensor, B: Tensor) -> InitialFactors:
        """Returns these factors with the residual W − s B A, so that all three together are W."""
        return InitialFactors(A, B, self.weight - self.scaling * B @ A)


class Initialisation(ABC):
    """How A and B get their first values; a frozen value.

    Attributes:
        replaces_weight: Whether another weight is read in place of W.
        subtracts_product: Whether that weight is W − s B A.
        needs_calibration: Whether it needs statistics that are collected on linear layers while the model runs.
        trains_b: Whether B is trained.
    """

    replaces_weight: ClassVar[bool] = False
    subtracts_product: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    trains_b: ClassVar[bool] = True

    def refusal(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Returns the reason why a weight can't be initialised so, or None; by default, a rank above the weight's.

        Args:
            shape: (out, in) of the weight.
            rank: The rank of A and B.
            scaling: The scale of the branch.
        """
        return rank_refusal(shape, rank)

    @abstractmethod
    def first(self, context: InitContext) -> InitialFactors:
        """Returns the first values."""
        ...


def rank_refusal(shape: tuple[int, int], rank: int) -> str | None:
    """Returns the reason why a weight of this shape has fewer than `rank` directions, or None."""
    if rank <= min(shape):
        return None
    return f"its rank is {min(shape)} at most, and r is {rank}; choose a smaller one"
