"""Spreads a model that accelerate has dispatched over devices, main memory and disk anew, after it got an adapter.

An adapter's tensors are always on the device where their layer runs, so a dispatched model needs nothing of this to run
with an adapter. It serves callers who ask for other places, as by ``device_map`` in PEFT's ``from_pretrained``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.holders import Holder
from graphpeft.graph.hosts.accelerate import disk_index
from graphpeft.graph.overrides import own_parameter
from graphpeft.wording import joined

Devices = Mapping[str, int | str | torch.device]
"""The devices of modules by their paths; ``"disk"`` is one."""


OPTIONS = ("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index")
"""The names of the arguments of `dispatch_again` that scripts pass when they load an adapter."""


def dispatch_again(
    model: Any,
    device_map: str | Devices | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    offload_index: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Dispatches a model anew that has modules in main memory or on disk; any other model is left alone, as in PEFT."""
    if offload_folder is not None and offload_dir is not None:
        raise ValueError("offload_folder and offload_dir are two names of one option; pass one of them")
    before: Devices = getattr(model, "hf_device_map", None) or {}
    if (device_map is None and max_memory is None) or {"cpu", "disk"}.isdisjoint(map(str, before.values())):
        return
    import accelerate
    from accelerate import hooks, utils

    index: Any = disk_index(model) if offload_index is None else offload_index
    lost = [name for name, place in index.items() if place is None]
    if lost:
        raise AdaptError(
            f"{joined(lost)} can't be dispatched anew, since they are on disk in no file of safetensors; dispatch the "
            "base model as you want it, and load the adapter without device_map and max_memory"
        )
    devices = _devices(model, device_map, max_memory)
    folder: Any = offload_folder if offload_dir is None else offload_dir
    to_disk = [name for name in model.state_dict() if _device_of(name, devices) == "disk"]
    new = [name for name in to_disk if name not in index]
    if new and folder is None:
        raise ValueError(f"{joined(new)} go to disk: pass offload_folder")
    hooks.remove_hook_from_submodules(model)
    _take_from_disk(model, {name: place for name, place in index.items() if name not in to_disk})
    left = {name: place for name, place in index.items() if name in to_disk}
    if new:
        os.makedirs(folder, exist_ok=True)
        tensors = model.state_dict()
        for name in new:
            left = utils.offload_weight(tensors[name], name, folder, left)
    accelerate.dispatch_model(model, devices, offload_dir=folder, offload_index=left or None)


def _devices(model: Any, device_map: str | Devices | None, max_memory: Any) -> dict[str, Any]:
    """Returns the devices of modules by their paths, as accelerate chooses them if the caller doesn't."""
    from accelerate import infer_auto_device_map, utils

    if device_map is not None and not isinstance(device_map, str):
        return dict(device_map)
    whole = _undivided(model)
    if device_map != "sequential":
        low_zero = device_map == "balanced_low_0"
        max_memory = utils.get_balanced_memory(model, max_memory, no_split_module_classes=whole, low_zero=low_zero)
    return infer_auto_device_map(model, max_memory, no_split_module_classes=whole)


def _undivided(model: nn.Module) -> list[str]:
    """Returns the classes of modules that must be on one device: those the model names, and those with adapters."""
    adapted = [type(module).__name__ for module in model.modules() if _has_holder(module)]
    return list(dict.fromkeys([*(getattr(model, "_no_split_modules", None) or ()), *adapted]))


def _has_holder(module: nn.Module) -> bool:
    return any(isinstance(child, Holder) for child in module._modules.values())


def _device_of(name: str, devices: Devices) -> Any:
    """Returns the device of a tensor, which is that of the innermost module around it that has one."""
    while name and name not in devices:
        name = name.rpartition(".")[0]
    return devices.get(name)


def _take_from_disk(model: nn.Module, index: Any) -> None:
    """Puts the values of weights into a model that are on disk; weights that are tied remain so."""
    from accelerate import utils

    values, tied = utils.OffloadedWeightsLoader(index=index), utils.find_tied_parameters(model)
    for name in index:
        path, _, own = name.rpartition(".")
        before = own_parameter(model.get_submodule(path), own)
        model.get_submodule(path)._parameters[own] = nn.Parameter(values[name], before.requires_grad)
    utils.retie_parameters(model, tied)
