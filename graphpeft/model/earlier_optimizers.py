"""Warns of an optimizer that was made before its model was adapted: it has frozen weights, and no adapter."""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from graphpeft.adapters.adapting import modules_of
from graphpeft.adapters.state import adapters_of
from graphpeft.graph.holders import has_tensor, tensor_at
from graphpeft.peft_errors import PeftWarning

_WATCHED: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Optimizer]] = weakref.WeakKeyDictionary()
"""The models of which no optimizer has been seen yet, each with the optimizers of other models that were seen."""


def watch(model: nn.Module) -> None:
    """Looks at the first step of each optimizer, until one that has parameters of the model was seen."""
    _look_at_steps()
    _WATCHED[model] = weakref.WeakSet()


# once and for good, since a hook can't go while hooks are called
@functools.cache
def _look_at_steps() -> None:
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for model, seen in list(_WATCHED.items()):
        if optimizer in seen:
            continue
        seen.add(optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not held.isdisjoint(map(id, model.parameters())):
            del _WATCHED[model]
            _warn_if_it_is_earlier(optimizer, held, model)


def _warn_if_it_is_earlier(optimizer: Optimizer, held: set[int], model: nn.Module) -> None:
    state = adapters_of(model)
    if state is None:
        return
    modules = modules_of(model)
    of_adapters = [
        tensor_at(modules[path], name)
        for adapter_name, adapter in state.by_name.items()
        for path, name in adapter.tensor_names(adapter_name)
        if path in modules and has_tensor(modules[path], name)
    ]
    trained = [tensor for tensor in of_adapters if tensor.requires_grad]
    # one for weights that are trained beside the adapter has no frozen ones
    has_frozen = any(id(each) in held for each in model.parameters() if not each.requires_grad)
    if trained and has_frozen and held.isdisjoint(map(id, trained)):
        warnings.warn(
            f"this {type(optimizer).__name__} has frozen weights of {type(model).__name__} and nothing of its trained "
            "adapter, which stays as it is: the optimizer was made before the model was adapted, or before another "
            "adapter became active. Make it afterwards",
            PeftWarning,
            stacklevel=4,
        )
