"""A trainer of Transformers that takes a few steps with a small model of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor


def tokens(seed: int = 0) -> Tensor:
    """Returns two sequences of five tokens."""
    return torch.randint(3, 20, (2, 5), generator=torch.Generator().manual_seed(seed))


def trainer_of(
    model: Any, folder: Path, rows: Any = None, callbacks: Any = None, **options: Any
) -> transformers.Trainer:
    """Returns one that takes four steps over such sequences and saves after two, unless it is told otherwise."""
    steps = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        seed=3,
        **{**steps, **options},
    )
    examples: Any = rows or [{"input_ids": row, "labels": row} for seed in range(4) for row in tokens(seed)]
    return transformers.Trainer(model, arguments, train_dataset=examples, callbacks=callbacks)


def losses(trainer: transformers.Trainer) -> list[float]:
    """Returns what it has logged of its steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
