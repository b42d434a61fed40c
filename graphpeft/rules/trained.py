"""The tensors that an adapter trains: parameters at its sites, and the model's own biases, modules and rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

Biases = Literal["none", "all", "adapted"]
"""The biases to train: none, all of the model, or only the biases of adapted layers."""


class FullyTrainedModule(NamedTuple):
    """A module that is fully trained.

    Attributes:
        infix: The infix between the module's path and its tensors' names in files; "" for none.
        option: The config option that names the module.

    Examples:
        >>> FullyTrainedModule(infix="ln_tuning_layers").option
        'target_modules'
    """

    infix: str = ""
    option: str = "target_modules"


class TableRows(NamedTuple):
    """Rows of a module's weight that are trained directly.

    Attributes:
        indices: The indices of the rows.
        key: The name of the rows' tensor in files, after the module's path.
        option: The config option that names the rows.
        written_for_tied: Whether files repeat the rows for each module that is tied to this one.

    Examples:
        >>> TableRows((20, 21)).key
        'token_adapter.trainable_tokens_delta'
    """

    indices: tuple[int, ...]
    key: str = "token_adapter.trainable_tokens_delta"
    option: str = "target_modules"
    written_for_tied: bool = False


class SiteParameters(NamedTuple):
    """An adapter's parameters at one site.

    Attributes:
        site: The site.
        parameters: The parameters by the rule's names.

    Examples:
        >>> parameters = {"lora_A": nn.Parameter(torch.zeros(2, 8))}
        >>> SiteParameters(site=None, parameters=parameters).parameters["lora_A"].shape
        torch.Size([2, 8])
    """

    site: Any
    parameters: Mapping[str, nn.Parameter]
