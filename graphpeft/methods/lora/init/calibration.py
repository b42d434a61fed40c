"""Statistics of a model's linear layers, which are collected before the model is adapted, or read from a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.files.atomic_files import Staging
from graphpeft.sites.layer_kinds import linear_classes
from graphpeft.targeting import targets

CALL_FIRST = (
    "on this model, or on the one that it is a copy of; call it first. An adapter is loaded without that if it was "
    "saved with path_initial_model_for_weight_conversion"
)
"""The end of the error where there are no statistics of a layer."""


def keep(layer: nn.Module, method: str, statistics: Any) -> None:
    """Keeps what was measured on a layer as an attribute of the layer, so that a copy of the model has it, too."""
    setattr(layer, _attribute(method), statistics)


def kept(layer: nn.Module, method: str) -> Any:
    """Returns what was measured on a layer, or on the one of which it is a copy; None if nothing was."""
    return vars(layer).get(_attribute(method))


def _attribute(method: str) -> str:
    return f"_graphpeft_{method}"


def targeted_layers(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Returns the linear layers that a config targets, by path."""
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
    """Returns whether a linear layer stores its weight as (in, out)."""
    return not isinstance(layer, nn.Linear)


def from_file_or(
    compute: Callable[[], Mapping[str, tuple[Tensor, ...]]],
    file: str | os.PathLike | None,
    layers: Mapping[str, nn.Module],
    keys: Sequence[str],
) -> Mapping[str, tuple[Tensor, ...]]:
    """Returns the statistics of layers, by path: from a file, or computed, and then written into it."""
    if file is not None and Path(file).exists() and Path(file).stat().st_size > 0:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        lacking = [key.format(path) for path in layers for key in keys if key.format(path) not in saved]
        if lacking:
            raise AdaptError(f"{file} lacks {lacking[0]}: it is of another model or config; give another file")
        devices = {path: layer.get_parameter("weight").device for path, layer in layers.items()}
        return {path: tuple(saved[key.format(path)].to(device) for key in keys) for path, device in devices.items()}
    found = compute()
    if file is not None:
        pairs = [zip(keys, tensors, strict=True) for tensors in found.values()]
        saved = {key.format(path): tensor for path, of in zip(found, pairs, strict=True) for key, tensor in of}
        with Staging(Path(file).parent) as staging:
            torch.save(saved, staging.folder / Path(file).name)
            staging.put()
    return found
