"""trl's trainers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import tiny
import torch
import trl
from workflow import Values, workflow

PAIRS = [
    {"prompt": "abc", "chosen": " def", "rejected": " xyz"},
    {"prompt": "hi", "chosen": " you", "rejected": " me"},
]
TEXTS = [{"text": "abc def ghi"}, {"text": "some words here"}]


@workflow("trl", "SFT")
def sft(peft: Any, folder: Path) -> Values:
    return {"losses": _losses(_trained("SFT", _adapted(peft), TEXTS, folder))}


@workflow("trl", "DPO: the reference is the adapter at the start, so that the first loss is ln 2")
def dpo(peft: Any, folder: Path) -> Values:
    trainer = _trained("DPO", _adapted(peft), PAIRS, folder)
    losses = _losses(trainer)
    assert abs(losses[0] - math.log(2)) < 1e-6
    assert getattr(trainer, "ref_model", None) is None
    return {"losses": losses}


def _adapted(peft: Any, **options: Any) -> Any:
    base = tiny.llama()
    torch.manual_seed(1)
    # its changes are felt from the first step on
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings | options))


def _trained(kind: str, model: Any, rows: list[dict[str, Any]], folder: Path, **options: Any) -> Any:
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        max_steps=3,
        save_steps=3,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to=[],
        seed=5,
        **options,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows * 4),
        processing_class=tiny.tokenizer(),
    )
    torch.manual_seed(9)
    trainer.train()
    return trainer


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
