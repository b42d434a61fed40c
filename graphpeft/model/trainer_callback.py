"""The callback by which Transformers' ``Trainer`` lets adapters change after each step."""

from __future__ import annotations

import functools
from typing import Any

from graphpeft.graph.paths import unwrapped


def update_and_allocate_callback() -> Any:
    """Returns a callback for a ``Trainer`` that calls ``model.update_and_allocate(step)`` after each optimizer step.

    Models without this method are left alone. The first step has the number 0, as in PEFT's examples.

    Returns:
        A ``transformers.TrainerCallback``.

    Raises:
        ImportError: If Transformers isn't installed.

    Example:
        >>> type(update_and_allocate_callback()).__name__
        'UpdateAndAllocateCallback'
    """
    return _callback_class()()


@functools.cache
def _callback_class() -> type[Any]:
    from transformers import TrainerCallback

    class UpdateAndAllocateCallback(TrainerCallback):
        """Lets the adapters of a trained model change after each step, while their gradients are there."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Calls the model's `update_and_allocate`, if it has one."""
            model: Any = unwrapped(kwargs["model"])
            if hasattr(model, "update_and_allocate"):
                model.update_and_allocate(state.global_step)

    return UpdateAndAllocateCallback
