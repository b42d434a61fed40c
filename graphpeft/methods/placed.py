"""Changes of a few elements of a weight: values at places.

ΔW[places] = v
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graphpeft.graph.changed_products import plus_branch
from graphpeft.graph.recorded import recorded
from graphpeft.rules.delta_rule import DeltaRule


@recorded
def placed(values: Tensor, places: Tensor, size: int) -> Tensor:
    """Returns zeros, (…, size), but for values at some places.

    Args:
        values: The values, (…, n).
        places: Their places, each another one, (n,).
        size: The number of elements.
    """
    # in place, since a result of its own would copy all zeros
    return values.new_zeros(*values.shape[:-1], size).scatter_(-1, places.long().expand_as(values), values)


@dataclass(frozen=True, kw_only=True)
class Placed(DeltaRule):
    """A change of some elements of one weight.

    Attributes:
        shape: The shape of ΔW.
        columns: The number of its columns as a matrix.
    """

    shape: tuple[int, ...]
    columns: int

    @abstractmethod
    def elements(self, own: Any) -> tuple[Any, Any]:
        """Returns the values, and their places."""
        ...

    def complete(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Refuses places outside of the weight, and one that is there twice."""
        places = self.elements(parameters)[1]
        if places.is_meta or not places.numel():
            return
        size = math.prod(self.shape)
        sides = (size // self.columns, self.columns) if places.ndim > 1 else (size,)
        for each, side in zip(places.reshape(len(sides), -1), sides, strict=True):
            if not 0 <= each.min() <= each.max() < side:
                raise ValueError(f"it has places of elements beyond those of the weight, {tuple(self.shape)}")
        if len(_flat(places, self.columns).unique()) < places.shape[-1]:
            raise ValueError("it has the place of an element twice")

    def adds_to_weight(self, operation: Any) -> bool:
        """Returns whether an operation is a product with a weight whose elements are in the order of the places."""
        return super().adds_to_weight(operation) and self.layout.exchanged is None

    def added(self, weight: Any, apart: Any, **own: Any) -> Any:  # type: ignore[override]  # a rule is given the arguments that it names
        """Returns W with its new elements, or W."""
        return _with_values(apart, weight, *self.elements(own))

    def delta(self, **own: Any) -> Any:
        """Returns ΔW."""
        return _change(True, *self.elements(own), self.shape, self.columns)

    def rewrite(
        self,
        x: Any,
        y: Any,
        operation: Any,
        training: Any,
        change: Any,
        bias_change: Any = None,
        dropout: Any = None,
        *,
        apart: Any = None,
        **own: Any,
    ) -> Any:
        """Returns y + operation(x, ΔW)."""
        if apart is None:
            return super().rewrite(x, y, operation, training, change, bias_change, dropout)
        return self.with_branch(x, y, operation, apart, own)

    def with_branch(self, x: Any, y: Any, operation: Any, apart: Any, own: Any) -> Any:
        """Returns y + operation(x, ΔW), or y in runs where the operation's weight has the change."""
        change = _change(apart, *self.elements(own), self.shape, self.columns)
        return plus_branch(y, operation.apply_if(apart, None, x, change))


@recorded
def _change(is_needed: bool, values: Tensor, places: Tensor, shape: tuple[int, ...], columns: int) -> Tensor | None:
    """Returns ΔW, if it is needed."""
    return placed(values, _flat(places, columns), math.prod(shape)).reshape(shape) if is_needed else None


@recorded
def _with_values(apart: bool, weight: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """Returns W with its new elements, or W for two products."""
    if apart:
        return weight
    return weight.reshape(-1).scatter_add(0, _flat(places, weight.shape[-1]), values).view(weight.shape)


def _flat(places: Tensor, columns: int) -> Tensor:
    """Returns where places are among a weight's elements, of which they may be the rows and the columns, (2, n)."""
    places = places.long()  # a place in a large weight is over what its row and its column are
    return places if places.ndim == 1 else places[0] * columns + places[1]
