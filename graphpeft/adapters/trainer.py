"""Lets Transformers' ``Trainer`` resume from its checkpoints of an adapted model.

A Trainer saves a model by its `save_pretrained` into ``checkpoint-<step>``, and loads it again by its
`load_state_dict` from `model.safetensors` in that folder. There, and only there, the adapter's file has that second
name.
"""

from __future__ import annotations

import re
from pathlib import Path

from graphpeft.files.atomic_files import link_or_copy

TRAINER_WEIGHTS_NAME = "model.safetensors"


def is_trainer_checkpoint(folder: Path) -> bool:
    """Returns whether `folder` is one that a Trainer will look into, by the name that Trainers give them."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def give_trainers_name(weights: Path, checkpoint: Path) -> None:
    """Makes the file `weights` known as the model's weights to a Trainer that resumes from `checkpoint`."""
    link_or_copy(weights, checkpoint / TRAINER_WEIGHTS_NAME)
