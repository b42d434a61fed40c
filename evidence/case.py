"""A model to trace, with inputs of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Case(NamedTuple):
    """A model to trace.

    Attributes:
        library: Where it comes from.
        name: What it is called there.
        build: Builds it; equal calls need not give equal weights.
        inputs: Makes inputs, positional ones or by name, for a batch of 1 to 3 and for a scale: 1, or another one for
            another length or resolution.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, float], tuple[Any, ...] | dict[str, Any]]

    @property
    def key(self) -> str:
        """Its name among all cases."""
        return f"{self.library}/{self.name}"
