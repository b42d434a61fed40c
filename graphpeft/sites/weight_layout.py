"""The stored layout of a weight, compared with PEFT's: (out, in), or (out, in / groups, *kernel) of a convolution."""

from __future__ import annotations

from typing import Any, NamedTuple


class WeightLayout(NamedTuple):
    """The dimensions in which a stored weight differs from PEFT's layout.

    Attributes:
        exchanged: The two dimensions that are stored in exchanged order, or None.
        groups: The groups of a transposed convolution, which is stored as (in, out / groups, *kernel).
        kernel: The sizes of a convolution's kernel; () for a matrix or a stack of matrices.
    """

    exchanged: tuple[int, int] | None = None
    groups: int = 1
    kernel: tuple[int, ...] = ()

    def turned(self, weight: Any) -> Any:
        """Converts a weight from the stored layout to PEFT's, or back; a tensor or a proxy."""
        if self.exchanged is None:
            return weight
        if self.groups == 1:
            return weight.transpose(*self.exchanged)
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def turned_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape that `turned` gives a weight of shape `shape`."""
        if self.exchanged is None:
            return shape
        sizes = list(shape)
        first, second = self.exchanged
        sizes[first], sizes[second] = sizes[second] * self.groups, sizes[first] // self.groups
        return tuple(sizes)
