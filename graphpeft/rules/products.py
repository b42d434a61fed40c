"""Changes of a weight that are products of factors, ΔW = s · F₁ F₂ …, in which an input meets the last factor first.

    h ΔWᵀ = s · ((h …ᵀ) F₂ᵀ) F₁ᵀ

A factor is a matrix, a diagonal, or any other linear map with a short way to apply it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor

_MATRICES: Any = (Tensor, fx.Proxy)


class Factor(ABC):
    """A linear map that isn't stored as a matrix.

    Examples:
        >>> class Reversed(Factor):
        ...     def applied(self, h):
        ...         return h.flip(-1)
        ...
        ...     def matrix(self):
        ...         return torch.eye(3).flip(0)
        >>> Product((torch.ones(1, 3), Reversed())).dense()
        tensor([[1., 1., 1.]])
    """

    @abstractmethod
    def applied(self, h: Any) -> Any:
        """Returns h Fᵀ.

        Args:
            h: The input, (…, columns).
        """
        ...

    @abstractmethod
    def matrix(self) -> Any:
        """Returns F, (…, rows, columns)."""
        ...


@dataclass(frozen=True)
class Diagonal(Factor):
    """A factor of each feature.

    Attributes:
        values: The factors, (…, features).

    Examples:
        >>> Product((Diagonal(torch.tensor([2.0, 3.0])), torch.ones(2, 1))).dense()
        tensor([[2.],
                [3.]])
    """

    values: Any

    def applied(self, h: Any) -> Any:
        """Returns the input times the factors."""
        return h * self.values

    def matrix(self) -> Any:
        """Returns the diagonal matrix."""
        return self.values.diag_embed()


@dataclass(frozen=True)
class Transposed(Factor):
    """The transpose of a matrix, by which an input is multiplied without it.

    Attributes:
        values: The matrix, (…, columns, rows).

    Examples:
        >>> Product((torch.ones(4, 2), Transposed(torch.ones(3, 2)))).applied(torch.ones(1, 3))
        tensor([[6., 6., 6., 6.]])
    """

    values: Any

    def applied(self, h: Any) -> Any:
        """Returns the input times the matrix."""
        return h @ self.values

    def matrix(self) -> Any:
        """Returns the transpose."""
        return self.values.mT


@dataclass(frozen=True)
class Product:
    """A change of a weight as a product.

    Attributes:
        factors: F₁, F₂, …: matrices, (…, m, n), and other factors.
        scale: s; None for 1.
        adds_bias: Whether `unscaled` adds the change of the bias, too, so that nobody else does where it is called.

    Examples:
        >>> change = Product((torch.ones(4, 2), torch.ones(2, 3)), scale=0.5)
        >>> change.applied(torch.ones(1, 3)), change.dense().shape
        (tensor([[3., 3., 3., 3.]]), torch.Size([4, 3]))
    """

    factors: tuple[Any, ...]
    scale: Any = None
    adds_bias: bool = False

    def unscaled(self, h: Any) -> Any:
        """Returns h ΔWᵀ / s, factor by factor.

        Args:
            h: The input, (…, in).
        """
        for factor in reversed(self.factors):
            h = F.linear(h, factor) if isinstance(factor, _MATRICES) else factor.applied(h)
        return h

    def applied(self, h: Any) -> Any:
        """Returns h ΔWᵀ, factor by factor.

        Args:
            h: The input, (…, in).
        """
        return self.scaled(self.unscaled(h))

    def turned(self, h: Any) -> Any:
        """Returns h ΔW / s, factor by factor.

        Args:
            h: The input, (…, out).
        """
        return _times(h, self.factors)

    def behind(self, rows: Any) -> Any:
        """Returns rows of the first factor, a matrix, times the other ones.

        Args:
            rows: The rows, (…, columns of F₁).
        """
        return _times(rows, self.factors[1:])

    def halves(self) -> tuple[Any, Any]:
        """Returns two matrices P and Q whose product is ΔW / s; Q is None where there is one factor alone."""
        matrices: list[Any] = []
        before: Any = None
        for factor in self.factors:
            if type(factor) is Diagonal and matrices:
                matrices[-1] = matrices[-1] * factor.values[..., None, :]
            elif type(factor) is Diagonal:
                before = factor.values if before is None else before * factor.values
            else:
                matrix = factor if isinstance(factor, _MATRICES) else factor.matrix()
                matrices.append(matrix if before is None else before[..., :, None] * matrix)
                before = None
        if before is not None:
            matrices.append(before.diag_embed())
        first, *others = matrices
        second: Any = None
        for matrix in reversed(others):
            second = matrix if second is None else matrix @ second
        return first, second

    def dense(self) -> Any:
        """Returns ΔW, (…, out, in)."""
        first, second = self.halves()
        return self.scaled(first if second is None else first @ second)

    def scaled(self, value: Any) -> Any:
        """Returns s times a value.

        Args:
            value: The value.
        """
        return value if self.scale is None else value * self.scale


def _times(h: Any, factors: tuple[Any, ...]) -> Any:
    for factor in factors:
        if type(factor) is Diagonal:
            h = factor.applied(h)
        else:
            h = h @ (factor if isinstance(factor, _MATRICES) else factor.matrix())
    return h
