"""The layers that PEFT adapts as modules, and the features that modules declare."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from graphpeft.graph import ops
from graphpeft.graph.ops import convolution, embedding
from graphpeft.graph.traced_model import plain_attribute


def linear_classes() -> tuple[type, ...]:
    """Returns the classes that PEFT adapts as modules with a linear weight."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear, pytorch_utils.Conv1D) if pytorch_utils is not None else (nn.Linear,)


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
