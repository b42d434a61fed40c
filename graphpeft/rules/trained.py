"""What an adapter trains: parameters at its sites; and of the model itself, whole modules and rows of tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

Biases = Literal["none", "all", "adapted"]
"""Which biases are trained: none, all of the model, or those of the adapted layers."""


class FullyTrainedModule(NamedTuple):
    """A module that is fully trained.

    Attributes:
        infix: What stands in files between its path and the names of the tensors in it; "" for nothing.
        option: The option that names it.

    Example:
        >>> FullyTrainedModule(infix="ln_tuning_layers").option
        'target_modules'
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

    Example:
        >>> TableRows((20, 21)).key
        'token_adapter.trainable_tokens_delta'
    """

    indices: tuple[int, ...]
    key: str = "token_adapter.trainable_tokens_delta"
    option: str = "target_modules"
    written_for_tied: bool = False


class SiteParameters(NamedTuple):
    """What an adapter has at one site.

    Attributes:
        site: The site.
        parameters: The rule's parameters there, by its names for them.

    Example:
        >>> parameters = {"lora_A": nn.Parameter(torch.zeros(2, 8))}
        >>> SiteParameters(site=None, parameters=parameters).parameters["lora_A"].shape
        torch.Size([2, 8])
    """

    site: Any
    parameters: Mapping[str, nn.Parameter]
