"""Warns of an optimizer that was made before its model was adapted: it has the frozen weights, and trains nothing."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from graphpeft.peft_errors import PeftWarning


def watch(model: nn.Module) -> None:
    """Looks at the first step of each optimizer, until one that has parameters of the model was seen.

    Args:
        model: A model that was adapted just now.
    """
    watched = weakref.ref(model)
    seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def check(optimizer: Optimizer, *_: Any) -> None:
        if torch.compiler.is_compiling() or optimizer in seen:
            return
        seen.add(optimizer)
        model = watched()
        if model is None or _has_any(optimizer, model):
            handle.remove()
        if model is not None:
            _warn_if_it_trains_nothing(optimizer, model)

    handle = register_optimizer_step_pre_hook(check)
    weakref.finalize(model, handle.remove)


def _has_any(optimizer: Optimizer, model: nn.Module) -> bool:
    return not _held(optimizer).isdisjoint(map(id, model.parameters()))


def _held(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _warn_if_it_trains_nothing(optimizer: Optimizer, model: nn.Module) -> None:
    held, trained = _held(optimizer), [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained and _has_any(optimizer, model) and held.isdisjoint(map(id, trained)):
        warnings.warn(
            f"this {type(optimizer).__name__} has frozen weights of {type(model).__name__} and none of its trained "
            "parameters, so its steps change nothing: it was made before the model was adapted, or before another "
            "adapter became active. Make it afterwards",
            PeftWarning,
            stacklevel=4,
        )
