"""The classifier of X-LoRA: linear layers with ReLU and dropout between them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.rules.parameter_spec import ParameterSpec

KEY = "internal_xlora_classifier.layers"
"""The begin of the names of its tensors in files, behind ``base_model.``."""


def numbers(config: Any) -> list[int]:
    """Returns the numbers of the layers in files, where PEFT counts what stands between them, too."""
    return [number * (3 if config.xlora_dropout_p > 0 else 2) for number in range(config.xlora_depth)]


def parameters(config: Any, experts: int, layers: int, dtype: torch.dtype) -> dict[str, ParameterSpec]:
    """Returns the parameters by the rule's names, which the first layer has."""
    last = experts * (layers if config.layerwise_scalings else 1)
    sizes = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), last]
    found = {}
    for number, (inputs, outputs) in zip(numbers(config), itertools.pairwise(sizes), strict=True):
        for kind, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            key = f"{KEY}.{number}.{kind}"
            found[_name(number, kind)] = ParameterSpec(shape, key, scope=key, written_once=True, dtype=dtype)
    return found


def layers_of(config: Any, parameters: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns the weight and the bias of each layer."""
    return [(parameters[_name(n, "weight")], parameters[_name(n, "bias")]) for n in numbers(config)]


def draw(layers: list[tuple[Tensor, Tensor]]) -> None:
    """Draws the first values in the default dtype, as PEFT does, whatever the dtype is."""
    for weight, bias in layers:
        drawn = nn.Linear(weight.shape[1], weight.shape[0])
        weight.copy_(drawn.weight)
        bias.copy_(drawn.bias)


def classified(hidden: Tensor, layers: list[tuple[Tensor, Tensor]], dropout: float, training: bool) -> Tensor:
    """Returns what the classifier makes of hidden states, (rows, positions, classes).

    Args:
        hidden: The hidden states, (rows, positions, features).
        layers: The weight and the bias of each layer.
        dropout: The probability of dropping an element behind each layer but the last.
        training: Whether elements are dropped.
    """
    *inner, (weight, bias) = layers
    for own_weight, own_bias in inner:
        hidden = F.linear(hidden, own_weight, own_bias).relu()
        hidden = F.dropout(hidden, dropout, training) if dropout else hidden
    return F.linear(hidden, weight, bias)


def _name(number: int, kind: str) -> str:
    return f"xlora_classifier_{number}_{kind}"
