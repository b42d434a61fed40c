"""Which adapter each row of a batch has, for the time of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from graphpeft.graph.per_call import PerCall


class PresentRows(Protocol):
    """The adapters of the rows of a call, as its regions ask for them."""

    @property
    def runners(self) -> Mapping[int, Callable[..., Any]]:
        """How each region runs, by the id of its module."""
        ...

    @property
    def are_off(self) -> bool:
        """Whether the model's adapters were disabled since."""
        ...

    def of(self, tensor: torch.Tensor) -> Any:
        """Returns the adapters of the rows of `tensor`, which have ``stacked`` and ``number`` as `RowAdapters` has."""
        ...


ROWS: PerCall[PresentRows] = PerCall(
    "rows",
    "pass adapter_names to the compiled model instead of entering mixed_batch around it, or run it in a thread "
    "(asyncio.to_thread)",
)
"""The rows of the present call."""


def present() -> Any:
    """Returns the rows of the present call."""
    rows = ROWS.get()
    assert rows is not None
    return rows
