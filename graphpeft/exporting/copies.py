"""Copies of a model to export from: changes of a copy leave the model itself unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from graphpeft.adapters import lifecycle
from graphpeft.exporting.errors import ExportError
from graphpeft.graph.holders import place_of
from graphpeft.graph.paths import modules_by_path


def sharing_weights(model: nn.Module) -> Any:
    """Returns a copy in evaluation mode that shares plain parameters' memory; callers must not write into them."""
    # new parameters in the same memory give the copy its own requires_grad; those of other classes may keep what a call
    # of the copy would take from them, as bitsandbytes' keep scales until the first call
    return _copied(model, {id(p): _same_memory(p) for p in model.parameters() if type(p) is nn.Parameter})


def with_own_weights(model: nn.Module) -> Any:
    """Returns a copy in evaluation mode with its own parameters."""
    return _copied(model, {})


def base_of(model: Any) -> Any:
    """Returns a copy of an adapted model's base in evaluation mode, with parameters of its own."""
    copied = with_own_weights(model)
    lifecycle.unload(copied, copied._peft_adapters, left={})
    return copied


def take_tensors_off(copied: Any, adapters: Iterable[str]) -> None:
    """Removes the tensors of adapters from a copy. Its graphs must not read them, or must get them as inputs."""
    modules = modules_by_path(copied)
    for name in adapters:
        for path, attribute in set(copied._peft_adapters.by_name[name].tensor_names(name)):
            holder, own = place_of(modules[path], attribute)
            for held in (holder._parameters, holder._buffers):
                held.pop(own, None)


def _same_memory(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), parameter.requires_grad)


def _copied(model: nn.Module, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(model, memo).eval()
    except (RuntimeError, TypeError) as error:
        raise ExportError(
            f"the {type(model).__name__} can't be copied, and an export works on a copy: {error}. Give its class a "
            "__deepcopy__, or detach() the tensors that it keeps"
        ) from error
