"""The methods of an adapted model for the loops that train it."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphpeft.adapters import training
from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.graph.paths import unwrapped
from graphpeft.model.adapter_info import AdapterInfo
from graphpeft.transaction import transaction


class _Available:
    """A method that an object has while a condition holds."""

    def __init__(self, function: Callable[..., Any], condition: Callable[[Any], bool]) -> None:
        self.__wrapped__, self._condition = function, condition
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self.__wrapped__
        if not self._condition(instance):
            raise AttributeError(f"{owner.__name__} has no {self.__wrapped__.__name__} with its present adapters")
        return types.MethodType(self.__wrapped__, instance)


def available_if(condition: Callable[[Any], bool]) -> Callable[[Callable[..., Any]], Any]:
    """Makes a method one that an object has while a condition holds, so that `hasattr` tells."""
    return lambda function: _Available(function, condition)


def _has_method_that_changes(model: Any) -> bool:
    return any(training.changes_after_steps(config) for config in model.peft_config.values())


class TrainingMethods(AdapterInfo):
    """The part of `PeftModel` that is called around training steps."""

    @available_if(_has_method_that_changes)
    def update_and_allocate(self, global_step: int) -> None:
        """Lets the adapters that are trained change after a step, as AdaLoRA moves ranks to where they matter most.

        Call it after ``loss.backward()`` and ``optimizer.step()``, and before the gradients are set to zero. A model
        has it if one of its adapters is of such a method.

        Args:
            global_step: The number of the step.

        Raises:
            AdaptError: If the method of no such adapter changes then; the model is as it was.
        """
        with transaction(self):
            training.update_and_allocate(modules_of(self), self._peft_adapters, global_step)

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Makes what a Transformers model's embedding returns require gradients.

        Reentrant checkpoints have no gradients if none of their inputs requires any, as in a frozen model. Layers that
        are quantised need no such call, see `prepare_model_for_kbit_training`.

        Args:
            model: The model; in PEFT it is the one inside of this one.

        Returns:
            The model.
        """
        flags = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        if not any(getattr(model, flag, False) for flag in flags):
            let_inputs_require_grad(model)
        return model


def penalty_of(model: Any) -> torch.Tensor:
    """Returns what the adapters that are trained add to a loss, such as AdaLoRA's distance from orthogonal factors.

    It is part of the `loss` that a Transformers model returns. Add it to a loss of another kind.

    Args:
        model: An adapted model, also inside of PyTorch's wrappers.

    Returns:
        The sum of the penalties, a scalar with gradients; 0 if no adapter has any, or the adapters are disabled.

    Raises:
        AdaptError: If the model isn't adapted.

    Examples:
        >>> config = AdaLoraConfig(orth_reg_weight=0.2, total_step=100, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> penalty_of(model).requires_grad
        True
    """
    model = unwrapped(model)
    found = training.penalties(lambda: modules_of(model), known_adapters(model))
    return torch.stack([each.to(found[0].device) for each in found]).sum() if found else torch.zeros(())


def let_inputs_require_grad(model: Any) -> None:
    """Makes what a Transformers model's embedding returns require gradients; any other model is left alone."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grad)


def _require_grad(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)
