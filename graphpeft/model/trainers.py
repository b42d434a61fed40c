"""Answers to trainers: the checkpoints from which Transformers' resumes, a callback for it, and trl's reference.

Transformers' ``Trainer`` saves a model by its `save_pretrained` into ``checkpoint-<step>``, and loads it again by its
`load_state_dict` from `model.safetensors` in that folder. There, and only there, the adapter's file has that second
name. If the method keeps something from step to step, that is a file of its own: it has the tensors as they are in the
model, and what the method keeps.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from graphpeft.adapters.adapting import known_adapter, modules_of
from graphpeft.adapters.state import Adapter, adapters_of
from graphpeft.adapters.training import let_rest
from graphpeft.files.atomic_files import link_or_copy
from graphpeft.graph.holders import has_tensor, tensor_at
from graphpeft.graph.paths import join, modules_by_path, unwrapped
from graphpeft.rules.config import PeftConfig
from graphpeft.transaction import transaction

TRAINER_WEIGHTS_NAME = "model.safetensors"


def is_trainer_checkpoint(folder: Path) -> bool:
    """Returns whether `folder` is one that a Trainer will look into, by the name that Trainers give them."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def give_trainers_name(weights: Path, staged: Path) -> None:
    """Makes the file `weights` known as the model's weights to a Trainer that resumes from the staged checkpoint."""
    link_or_copy(weights, staged / TRAINER_WEIGHTS_NAME)


def as_at_first(adapter: Adapter) -> Adapter:
    """Returns an adapter with the options that training has changed as they are in a fresh one."""
    return dataclasses.replace(adapter, config=_with(adapter.config, adapter.config.unchanged))


def write(config: PeftConfig, tensors: Mapping[str, torch.Tensor], staged: Path) -> None:
    """Writes the tensors of an adapter for a Trainer, with what its method keeps from step to step."""
    everything = {**tensors, **{_STATE + name: tensor for name, tensor in config.training_state().items()}}
    # safetensors refuses tensors that share memory
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in everything.items()}
    save_file(copies, staged / TRAINER_WEIGHTS_NAME, metadata={"format": "pt"})


def without_state(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the tensors of an adapter, and what its method has kept from step to step."""
    state = {name.removeprefix(_STATE): tensor for name, tensor in tensors.items() if name.startswith(_STATE)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_STATE)}, state


_STATE = "training_state."
"""How the names begin under which a checkpoint has what a method keeps."""


def _with(config: PeftConfig, values: Mapping[str, Any]) -> PeftConfig:
    changed = copy.copy(config)
    vars(changed).update(values)
    return changed


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


_POLICY = "default"
"""The adapter that trl trains."""


@torch.no_grad()
def copy_left_out(model: Any, adapter_name: str) -> None:
    """Copies those tensors of the trained adapter that trl leaves out into those of a new one like it.

    Its reference is an adapter that it adds. It finds the trained one's tensors by their names, ``….default.…``, and
    copies each to ``….ref.…``. So it leaves out those whose names begin or end with the adapter's, as trained rows' do
    in PEFT, too.
    """
    modules, adapter = modules_of(model), known_adapter(model, adapter_name)
    pairs = zip(adapter.tensor_names(adapter_name), adapter.tensor_names(_POLICY), strict=True)
    for (path, name), (_, source) in pairs:
        if f".{_POLICY}." not in join(path, source) and has_tensor(modules[path], source):
            tensor_at(modules[path], name).copy_(tensor_at(modules[path], source))
