"""Which adapter each row of a batch has, for the time of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from graphpeft.graph.call_values import PerCall


class RowParameters(Protocol):
    """The parameters and numbers of the adapters of a tensor's rows, as graphs for mixed batches read them."""

    def stacked(self, owner: nn.Module, stem: str, where: Any) -> torch.Tensor:
        """Returns the parameters `stem` of `owner`, one for each row in a first dimension."""
        ...

    def number(self, owner: nn.Module, stem: str, missing: float | None) -> Any:
        """Returns the number `stem` of `owner`: one for all rows, or a tensor with one for each row."""
        ...


class PresentRows(Protocol):
    """The adapters of the rows of a call, as its regions ask for them."""

    def runner_of(self, module: nn.Module) -> Callable[..., Any] | None:
        """Returns how a region runs, or None where it runs as it does without rows."""
        ...

    def read(self, module: nn.Module, acting: Any) -> torch.Tensor | None:
        """Returns a tensor for code that reads it outside of graphs by row; None if the module isn't the model's."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters that some row has."""
        ...

    def of(self, tensor: torch.Tensor, module: nn.Module) -> RowParameters:
        """Returns the parameters of the adapters of the rows of `tensor`, which `module` is given."""
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
