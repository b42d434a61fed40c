"""Lets Transformers' ``Trainer`` resume from its checkpoints of an adapted model.

A Trainer saves a model by its `save_pretrained` into ``checkpoint-<step>``, and loads it again by its
`load_state_dict` from `model.safetensors` in that folder. There, and only there, the adapter's file has that second
name. If the method keeps something from step to step, that is a file of its own: it has the tensors as they are in the
model, and what the method keeps.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from graphpeft.adapters.state import Adapter
from graphpeft.files.atomic_files import link_or_copy
from graphpeft.rules.config import PeftConfig

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
