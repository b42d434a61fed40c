"""A call of an adapted model, as a config sees it that computes what its rules read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch


class PresentCall(NamedTuple):
    """A call of a model that has an adapter.

    Attributes:
        model: The model.
        arguments: The arguments of the call, by name.
        prompt: The tokens from which the model generates, (rows, length), if it does.
        parameters_at: Returns the adapter's parameters at its site of a number, by the rule's names.
        run: Runs the model's forward on the arguments of the call. It takes what rules read in that run beside the
            other adapters' inputs, as `PeftConfig.call_inputs_from` returns it, and other arguments by name.
        is_training: Whether the model is in training mode.

    Examples:
        >>> call = PresentCall(None, {"x": 1}, None, lambda number: {}, lambda inputs, **others: inputs | others, False)
        >>> call.run({"read": 2}, x=3)
        {'read': 2, 'x': 3}
    """

    model: Any
    arguments: Mapping[str, Any]
    prompt: torch.Tensor | None
    parameters_at: Callable[[int], Mapping[str, torch.Tensor]]
    run: Callable[..., Any]
    is_training: bool
