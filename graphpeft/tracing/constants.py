"""Constants of a graph: objects that a forward uses and that aren't attributes of its modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphpeft.graph.changed_weight import RefusedWeight
from graphpeft.graph.errors import TraceError


class Constants:
    """The constants of one tracer's graphs.

    Attributes:
        values: The constants by name, stored as attributes of the graph's root.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._made: dict[str, Any] = {}

    def begin(self) -> None:
        """Starts a recording: forgets the names of the last recording's constants."""
        self._made = {}

    def name_of(self, value: Any, is_made_anew: Callable[[Any], bool]) -> str:
        """Returns the name of a constant. A tensor that each recording makes again keeps its name of the last one.

        Args:
            value: The constant.
            is_made_anew: Returns whether a constant is a tensor that the forward has made.

        Raises:
            TraceError: If it is a weight that has no changed numbers.
        """
        if isinstance(value, RefusedWeight):
            raise TraceError(value.reason)
        names = [name for name, constant in self.values.items() if constant is value]
        names += [name for name, made in self._made.items() if made is value]
        if not names and is_made_anew(value):
            earlier = [name for name in self.values if name not in self._made and is_made_anew(self.values[name])]
            names = [name for name in earlier if _is_equal(value, self.values[name])]
        name = names[0] if names else f"_constant_{len(self.values)}"
        self.values.setdefault(name, value)
        self._made[name] = value
        return name


def _is_equal(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if (tensor.dtype, tensor.device) != (other.dtype, other.device):
        return False
    return not tensor.is_meta and not tensor.requires_grad and not other.requires_grad and torch.equal(tensor, other)
