"""What the workflows of trl share: data, adapted models, and a short training."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import datasets
import tiny
import torch
import trl

TEXTS = [{"text": "abc def ghi"}, {"text": "some words here"}]
COMPLETIONS = [{"prompt": "abc", "completion": " def"}, {"prompt": "hi", "completion": " you there"}]
PAIRS = [
    {"prompt": "abc", "chosen": " def", "rejected": " xyz"},
    {"prompt": "hi", "chosen": " you", "rejected": " me"},
]
JUDGED = [
    {"prompt": "abc", "completion": " def", "label": True},
    {"prompt": "hi", "completion": " me", "label": False},
]
ANSWERS = [{"chosen": "abc def", "rejected": "abc xyz"}, {"chosen": "hi you", "rejected": "hi me"}]
PROMPTS = [{"prompt": "abc"}, {"prompt": "hello there"}]

OWN = (
    "ref_model",
    "reward_funcs",
    "eval_dataset",
    "processing_class",
    "callbacks",
    "reward_processing_classes",
    "teacher_model",
    "peft_config",
)  # the trainer's, not its config's


def lora(peft: Any, **options: Any) -> Any:
    """Returns a config whose changes are felt from the first step on."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", **settings, **options})


def adapted(peft: Any, base: Any = None, **options: Any) -> Any:
    """Returns `base`, or a causal model, with LoRA on queries and values."""
    base = base or tiny.llama()
    torch.manual_seed(1)
    return peft.get_peft_model(base, lora(peft, **options))


def prompted(peft: Any, base: Any = None, task_type: str = "CAUSAL_LM") -> Any:
    """Returns `base`, or a causal model, with a prompt of four tokens."""
    base = base or tiny.llama()
    torch.manual_seed(1)
    return peft.get_peft_model(base, peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=4))


def trainer(kind: str, model: Any, rows: list[dict[str, Any]], folder: Path, **options: Any) -> Any:
    """Returns the trainer of that name; options are its config's, or its own."""
    own = {name: options.pop(name) for name in OWN if name in options}
    home: Any = trl if hasattr(trl, f"{kind}Trainer") else _experimental(kind)
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": [],
        "seed": 5,
    }
    return getattr(home, f"{kind}Trainer")(
        model=model,
        args=getattr(home, f"{kind}Config")(**{**settings, **options}),
        train_dataset=datasets.Dataset.from_list(rows * 4),
        **{"processing_class": tiny.tokenizer(), **own},
    )


def trained(*arguments: Any, **options: Any) -> Any:
    """Returns a `trainer` after its training."""
    made = trainer(*arguments, **options)
    torch.manual_seed(9)
    made.train()
    return made


def losses(trained: Any) -> list[float]:
    """Returns the losses of its steps."""
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def lengths(completions: list[str], **_: Any) -> list[float]:
    """Returns rewards."""
    return [float(len(text) % 3) for text in completions]


def _experimental(kind: str) -> Any:
    name = {"OnlineDPO": "online_dpo"}.get(kind, kind.lower())
    return importlib.import_module(f"trl.experimental.{name}")
