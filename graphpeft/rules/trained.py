"""What an adapter trains of the model itself: whole modules, and rows of tables."""

from __future__ import annotations

from typing import Literal, NamedTuple

Biases = Literal["none", "all", "adapted"]
"""Which biases are trained: none, all of the model, or those of the adapted layers."""


class WholeModule(NamedTuple):
    """A module that is trained whole.

    Attributes:
        infix: What stands in files between its path and the names of the tensors in it; "" for nothing.
        option: The option that names it.
    """

    infix: str = ""
    option: str = "target_modules"


class TableRows(NamedTuple):
    """Rows of a module's weight that are trained as they are.

    Attributes:
        indices: Which.
        key: The name in files of the tensor that has these rows, behind the module's path.
        option: The option that names them.
        written_for_tied: Whether files hold them once more for each module that is tied to this one.
    """

    indices: tuple[int, ...]
    key: str = "token_adapter.trainable_tokens_delta"
    option: str = "target_modules"
    written_for_tied: bool = False
