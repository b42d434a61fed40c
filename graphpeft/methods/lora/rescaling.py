"""Multiplies the scales of a model's LoRA adapters for a while: y + m · s · B A x in place of y + s · B A x."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from graphpeft.adapters.scales import scaled
from graphpeft.graph.paths import unwrapped


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiplies the scales of all LoRA adapters of a model within a context; compiled code is compiled again.

    A multiplier in [0, 1] interpolates between the base and the adapted model, as WiSE-FT does (Wortsman et al.,
    "Robust fine-tuning of zero-shot models", arXiv 2109.01903).

    Args:
        model: An adapted model.
        multiplier: The factor.

    Yields:
        Nothing.

    Raises:
        TypeError: If `multiplier` is no number.
        AdaptError: If the model has no adapter with a scale, or one is merged, whose scale is in the weights.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
        >>> with rescale_adapter_scale(model, 0.5):
        ...     model[0].default.lora_scaling
        1.5
        >>> model[0].default.lora_scaling
        3.0
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
        raise TypeError(f"multiplier is a {type(multiplier).__name__}; pass a number")
    with scaled(unwrapped(model), multiplier):
        yield
