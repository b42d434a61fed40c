"""Adapters as arguments with a row for each adapter, and a row of the batch has the one that `adapter_rows` says.

Each tensor of an adapter has one dimension more in front, the adapters, and so has each number. The graphs are those
of a mixed batch (`mixing.py`), which read what is stacked row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from graphpeft.adapters.rows import Runner


class GivenRows:
    """The rows of a call in which modules have the tensors of all adapters in the place of those of one.

    Args:
        name: That one.
        rows: The number of the adapter of each row, int64 of the shape (batch,).
    """

    runners: Mapping[int, Runner] = {}
    are_off = False

    def __init__(self, name: str, rows: Tensor) -> None:
        self._name, self._rows = name, rows

    def of(self, tensor: Tensor) -> GivenRows:
        """Returns the adapters of the rows of `tensor`.

        Raises:
            ValueError: If it has another number of rows.
        """
        if not tensor.ndim or tensor.shape[0] != self._rows.shape[0]:
            raise ValueError(
                f"adapter_rows has {self._rows.shape[0]} rows, and an adapted module is given a tensor of the shape "
                f"{tuple(tensor.shape)}, whose first dimension must be the batch"
            )
        return self

    def stacked(self, owner: nn.Module, stem: str, where: Any) -> Tensor:
        """Returns the parameters `stem` of `owner`, one for each row."""
        return getattr(owner, f"{stem}_{self._name}").index_select(0, self._rows)

    def number(self, owner: nn.Module, stem: str, missing: float | None) -> Any:
        """Returns the numbers `stem` of `owner`, one for each row; a number for all that isn't an input."""
        number = getattr(owner, f"{stem}_{self._name}")
        return number.index_select(0, self._rows) if isinstance(number, Tensor) else number
