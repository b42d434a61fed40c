"""What the workflows of Transformers' Trainer share: data, adapted models, and a short training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from torch.utils.data import Dataset


class Rows(Dataset[dict[str, Any]]):
    """Rows, the same ones at each call."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def texts(count: int = 8, length: int = 6) -> Rows:
    """Returns tokens to go on with."""
    drawn = torch.randint(3, len(tiny.LETTERS), (count, length), generator=torch.Generator().manual_seed(2))
    return Rows([{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in drawn])


def adapted(peft: Any, base: Any = None, **options: Any) -> Any:
    """Returns `base`, or a causal model, with LoRA on queries and values whose changes are felt at once."""
    base = base or tiny.llama()
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(1)
    return peft.get_peft_model(base, peft.LoraConfig(**{"task_type": "CAUSAL_LM", **settings, **options}))


def trainer(model: Any, folder: Path, rows: Any = None, **options: Any) -> Any:
    """Returns a trainer; options go to `TrainingArguments` or to the trainer."""
    own = {name: options.pop(name) for name in OWN if name in options}
    seq2seq = "predict_with_generate" in options
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "seed": 5,
    }
    name = "Seq2SeqTrain" if seq2seq else "Train"
    arguments = getattr(transformers, f"{name}ingArguments")(**{**settings, **options})
    own.setdefault("train_dataset", rows or texts())
    return getattr(transformers, f"{name}er")(model=model, args=arguments, **own)


OWN = ("eval_dataset", "compute_metrics", "callbacks", "model_init", "optimizers", "data_collator", "processing_class")


def trained(*arguments: Any, **options: Any) -> Any:
    """Returns a `trainer` after its training."""
    made = trainer(*arguments, **options)
    torch.manual_seed(9)
    made.train()
    return made


def losses(trainer: Any) -> list[float]:
    """Returns the losses of its steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
