"""What is measured on modules while their model runs, kept beside them until adapters are made from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.sites.layer_kinds import linear_classes
from graphpeft.targeting import targets

Measurements = WeakKeyDictionary[nn.Module, Any]
"""By the module itself: the model isn't changed, and what was measured goes with it."""


def targeted_layers(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Returns the linear layers that a config targets, by path.

    Raises:
        AdaptError: If there are none.
    """
    decide = targets.compile_matcher(config.resolved(model).target_options)
    layers = {
        path: module
        for path, module in model.named_modules()
        if path and isinstance(module, linear_classes()) and decide(path) is targets.Match.YES
    }
    if not layers:
        raise AdaptError(f"target_modules names no linear layer of the {type(model).__name__}")
    return layers


def is_stored_transposed(layer: nn.Module) -> bool:
    """Tells whether a linear layer stores its weight as (in, out)."""
    return not isinstance(layer, nn.Linear)


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts all modules into training or evaluation mode for a while."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def read_cache(file: str | None) -> dict[str, Tensor] | None:
    """Reads tensors that were measured before, onto the CPU; None if there is no such file."""
    if file is None or not Path(file).exists() or Path(file).stat().st_size == 0:
        return None
    return torch.load(file, map_location="cpu", weights_only=True)


def write_cache(file: str | None, tensors: dict[str, Tensor]) -> None:
    """Writes measured tensors, unless `file` is None."""
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, file)


def cached(cache: dict[str, Tensor], name: str, file: str | None, layer: nn.Module) -> Tensor:
    """Returns a tensor of a cache, on the device of a layer.

    Raises:
        AdaptError: If it isn't there.
    """
    if name not in cache:
        raise AdaptError(f"{file} lacks {name}: it is of another model or config; give another file")
    return cache[name].to(layer.get_parameter("weight").device)
