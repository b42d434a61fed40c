"""Writes a cache of the model hub with tiny models, by the names under which PEFT's tests load them.

    python hub.py FOLDER

The folder is then what `HF_HOME` names. Weights are random, from a seed for each model. Sizes follow the models of the
same names on the hub where tests depend on them.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusion
import torch
import transformers
from hub_processors import image_processor, llava_processor, tokenizer
from tiny_models import ADAPTERS, MODELS, OTHER_REVISIONS, Model

REVISION = "0" * 40


def main(home: Path) -> None:
    """Writes the repositories that are missing, and prints those that can't be made."""
    for name, model in MODELS.items():
        _write(home, name, lambda folder, model=model: _model(model, folder))
    _write(home, diffusion.NAME, lambda folder: diffusion.pipeline().save_pretrained(folder))
    for name, (base, task, subfolder) in ADAPTERS.items():
        _write(home, name, lambda folder, given=(home, base, task, subfolder): _adapter(*given, folder))


def _write(home: Path, name: str, save: Callable[[Path], Any]) -> None:
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    if (repository / "refs" / "main").exists():
        return
    folder = repository / "snapshots" / REVISION
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(zlib.crc32(name.encode()))
    try:
        save(folder)
    except Exception as error:
        # the tests that need it then fail with PEFT, too, and are out of scope
        sys.stderr.write(f"{name}: {type(error).__name__}: {str(error)[:300]}\n")
        return
    (repository / "refs").mkdir(exist_ok=True)
    for revision in ("main", *OTHER_REVISIONS.get(name, ())):
        (repository / "refs" / revision).write_text(REVISION)


def _model(model: Model, folder: Path) -> None:
    config = getattr(transformers, model.config)(**model.sizes)
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        if hasattr(part, "initializer_range"):
            # so that what an adapter changes is seen in what the model returns
            part.initializer_range = 0.2
    made = getattr(transformers, model.cls)(config)
    made.save_pretrained(folder)
    if model.beside == "image processor":
        image_processor().save_pretrained(folder)
    elif model.beside == "llava processor":
        llava_processor(config).save_pretrained(folder)
    else:
        tokenizer(config).save_pretrained(folder)


def _adapter(home: Path, base: str, task: str | None, subfolder: str, folder: Path) -> None:
    import peft

    model = _base(home, base, task)
    config = peft.LoraConfig(
        task_type=task,
        base_model_name_or_path=base,
        target_modules=["q_proj", "v_proj"] if task is None else None,
        init_lora_weights=False,
    )
    peft.get_peft_model(model, config).save_pretrained(folder / subfolder)


def _base(home: Path, base: str, task: str | None) -> Any:
    classes = {
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "AutoModel",
        None: "WhisperForConditionalGeneration",
    }
    path = home / "hub" / f"models--{base.replace('/', '--')}" / "snapshots" / REVISION
    model = getattr(transformers, classes[task]).from_pretrained(path)
    model.config._name_or_path = model.name_or_path = base
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
