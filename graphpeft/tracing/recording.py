"""A recording that goes on: what was before it, and how code runs that is no part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import nn

from graphpeft.tracing.iterators import draws_error
from graphpeft.tracing.snapshot import Snapshot


class Recording(NamedTuple):
    """A recording that goes on.

    Attributes:
        before: What all that the forward can reach was before it, and is put back to.
        drawing: The modules whose code names an iterator, with what it is to the code.
        set_aside: What a call that isn't recorded runs under, so that it doesn't go through the costliest exchanges.
        outside: What code runs under that is no part of the trace: as it would without one.
    """

    before: Snapshot
    drawing: Mapping[nn.Module, str]
    set_aside: Callable[[], AbstractContextManager[None]]
    outside: Callable[[], AbstractContextManager[None]]

    def refuse_iterators(self, module: nn.Module) -> None:
        """Raises TraceError if the code of `module` can draw from an iterator."""
        if module in self.drawing:
            raise draws_error(self.drawing[module])
