"""How a weight is stored, beside PEFT's layout: (out, in), or (out, in / groups, *kernel) of a convolution."""

from __future__ import annotations

from typing import Any, NamedTuple


class WeightLayout(NamedTuple):
    """The dimensions in which a stored weight differs from PEFT's layout.

    Attributes:
        exchanged: The two dimensions that are stored the other way round, or None.
        groups: The groups of a transposed convolution, which is stored as (in, out / groups, *kernel).
    """

    exchanged: tuple[int, int] | None = None
    groups: int = 1

    def turned(self, weight: Any) -> Any:
        """Returns a stored weight in PEFT's layout, or one in PEFT's layout as it is stored; tensors and proxies."""
        if self.exchanged is None:
            return weight
        if self.groups == 1:
            return weight.transpose(*self.exchanged)
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def turned_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape that `turned` gives to a weight of this one."""
        if self.exchanged is None:
            return shape
        sizes = list(shape)
        first, second = self.exchanged
        sizes[first], sizes[second] = sizes[second] * self.groups, sizes[first] // self.groups
        return tuple(sizes)
