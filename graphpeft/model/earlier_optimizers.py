"""Warns of an optimizer that was made before its model was adapted: it has the frozen weights, and trains nothing."""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from graphpeft.peft_errors import PeftWarning

_WATCHED: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Optimizer]] = weakref.WeakKeyDictionary()
"""The models of which no optimizer has been seen yet, each with the optimizers of other models that were seen."""


def watch(model: nn.Module) -> None:
    """Looks at the first step of each optimizer, until one that has parameters of the model was seen.

    Args:
        model: A model that was adapted just now.
    """
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
            _warn_if_it_trains_nothing(optimizer, held, model)


def _warn_if_it_trains_nothing(optimizer: Optimizer, held: set[int], model: nn.Module) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained and held.isdisjoint(map(id, trained)):
        warnings.warn(
            f"this {type(optimizer).__name__} has frozen weights of {type(model).__name__} and none of its trained "
            "parameters, so its steps change nothing: it was made before the model was adapted, or before another "
            "adapter became active. Make it afterwards",
            PeftWarning,
            stacklevel=4,
        )
