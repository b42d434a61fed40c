"""The layers that PEFT adapts as modules, and the features that modules declare."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from graphpeft.graph import ops
from graphpeft.graph.ops import convolution, embedding
from graphpeft.graph.traced_model import plain_attribute, stands_for


def linear_classes() -> tuple[type, ...]:
    """Returns the classes that PEFT adapts as modules with a linear weight."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear, pytorch_utils.Conv1D) if pytorch_utils is not None else (nn.Linear,)


def is_linear(module: nn.Module) -> bool:
    """Returns whether a module is a linear layer: one that PEFT knows, or a library's own, by name and weight."""
    cls = stands_for(module)
    if issubclass(cls, linear_classes()):
        # the output projection of nn.MultiheadAttention is read but never called
        return not isinstance(module, NonDynamicallyQuantizableLinear)
    if not cls.__name__.endswith("Linear"):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and (is_lazy(weight) or weight.ndim == 2)


def layers_in(modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the kinds of layers with parameters among modules, each with the name of the first."""
    first: dict[str, str] = {}
    for path, module in modules.items():
        if path and any(parameter is not None for parameter in module._parameters.values()):
            first.setdefault(stands_for(module).__name__, path)
    return [f"{kind} ({path})" for kind, path in first.items()] or ["none with parameters"]


def declares_features(module: nn.Module) -> bool:
    """Returns whether a module declares `in_features` and `out_features`, as layers do."""
    return all(type(count) is int for count in declared_features(module))


def declared_features(module: nn.Module) -> list[Any]:
    """Returns `in_features` and `out_features` of a module; None for each that it doesn't declare."""
    return [plain_attribute(module, name, None) for name in ("in_features", "out_features")]


@functools.lru_cache(maxsize=256)
def kind_of_layer(cls: type) -> type | None:
    """Returns the kind of operation that a layer computes, or None for other classes."""
    kinds = {ops.Linear: linear_classes(), ops.Convolution: convolution.LAYERS, ops.Embedding: embedding.LAYERS}
    return next((kind for kind, classes in kinds.items() if issubclass(cls, classes)), None)
