"""The rows of a batch in a model whose adapters are arguments: `adapter_rows` chooses the adapter of each row.

Each tensor and number of an adapter has an additional first dimension, the adapters. The graphs are those for mixed
batches (`adapters/mixing.py`), which read a parameter or a number for each row.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from graphpeft.adapters.present_rows import RowParameters
from graphpeft.exporting.errors import ExportError
from graphpeft.graph.holders import name_at, place_of, value_at
from graphpeft.wording import number_of


class GivenRows:
    """The rows of a call in which the attributes of one adapter hold the stacked tensors of several adapters.

    Implements `PresentRows` for the call, and `RowParameters` for each tensor in the call.

    Args:
        name: The adapter that has the attributes.
        rows: The index of each row's adapter in the stack, int64 of shape (batch,).
    """

    names: tuple[str, ...] = ()

    def __init__(self, name: str, rows: Tensor) -> None:
        self._name, self._rows = name, rows

    def runner_of(self, module: nn.Module) -> None:
        """Returns None: the graphs that modules wear are those for rows."""

    def read(self, module: nn.Module, acting: Any) -> Tensor:
        """Raises ExportError, since a tensor of a module that is read differs from row to row."""
        raise ExportError(
            f"the model's code reads {acting.name} of an adapted {type(module).__name__} beside its call, and that "
            "differs from row to row; leave the layer out, or export with adapters='inputs'"
        )

    def of(self, tensor: Tensor, module: nn.Module) -> RowParameters:
        """Returns the adapters' parameters for the rows of `tensor`.

        Args:
            tensor: The tensor.
            module: The module that is given it.

        Raises:
            ValueError: If `tensor` has another number of rows.
        """
        if not tensor.ndim or tensor.shape[0] != self._rows.shape[0]:
            raise ValueError(
                f"adapter_rows has {number_of(self._rows.shape[0], 'row')}, and an adapted {type(module).__name__} is "
                f"given a tensor of the shape {tuple(tensor.shape)}, whose first dimension must be the batch"
            )
        return self

    def stacked(self, owner: nn.Module, stem: str, where: Any) -> Tensor:
        """Returns the parameters `stem` of `owner`, stacked for the rows."""
        return value_at(owner, name_at(self._name, stem)).index_select(0, self._rows)

    def dropout(self, owner: nn.Module, stem: str) -> float:
        """Returns 0, since an exported program drops nothing."""
        return 0.0

    def number(self, owner: nn.Module, stem: str, missing: float | None) -> Any:
        """Returns the numbers `stem` of `owner`, one for each row; one number for all rows if it isn't an input."""
        holder, own = place_of(owner, name_at(self._name, stem))
        number = getattr(holder, own, missing)
        return number.index_select(0, self._rows) if isinstance(number, Tensor) else number
