"""The callback by which Transformers' ``Trainer`` lets adapters change after each step."""

from __future__ import annotations

import functools
from typing import Any

from graphpeft.adapters.state import adapters_of
from graphpeft.adapters.training import let_rest
from graphpeft.graph.paths import modules_by_path, unwrapped
from graphpeft.transaction import transaction


def update_and_allocate_callback() -> Any:
    """Returns a callback for a ``Trainer`` that calls ``model.update_and_allocate(step)`` after each optimizer step.

    Models without this method are left alone. The first step has the number 0, as in PEFT's examples.

    Returns:
        A ``transformers.TrainerCallback``.

    Raises:
        ImportError: If Transformers isn't installed.

    Examples:
        >>> type(update_and_allocate_callback()).__name__
        'UpdateAndAllocateCallback'
    """
    return _callback_class()()


@functools.cache
def _callback_class() -> type[Any]:
    from transformers import TrainerCallback

    class UpdateAndAllocateCallback(TrainerCallback):
        """Lets the adapters of a trained model change after each step, while their gradients are there."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Lets rest what rested in the checkpoint from which a Trainer resumes; its optimizer has it, though."""
            model: Any = unwrapped(kwargs["model"])
            adapters = adapters_of(model)
            if adapters is not None:
                with transaction(model):
                    let_rest(modules_by_path(model), adapters)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Calls the model's `update_and_allocate`, if it has one."""
            model: Any = unwrapped(kwargs["model"])
            if hasattr(model, "update_and_allocate"):
                model.update_and_allocate(state.global_step)

    return UpdateAndAllocateCallback
