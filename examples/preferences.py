"""DPO with trl: a small Llama that has learned this project's English comes to prefer it in capitals.

    train a base ─▶ get_peft_model ─▶ trl's DPOTrainer ─▶ which of two continuations is more likely?

trl copies the adapter as the reference of what it trains, so that there is no second base in memory, and the first loss
is ln 2. It needs ``pip install trl datasets``. Takes about 15 s on one core. Run it with
``python examples/preferences.py``.
"""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

import graphpeft

PROJECT = Path(__file__).resolve().parent.parent
WORDS = 3  # of a prompt, and of what follows


class Result(NamedTuple):
    """What came of it.

    Attributes:
        before: The share of held-out prompts that the base continues rather in capitals.
        after: The same with the adapter.
        first_loss: The loss of DPO's first step: that of a policy which is its reference.
        adapters: The names of the adapters on the model after training.
    """

    before: float
    after: float
    first_loss: float
    adapters: list[str]


def text() -> str:
    pages = [PROJECT / "README.md", *sorted(PROJECT.glob("docs/*.md"))]
    plain = " ".join(page.read_text(encoding="utf-8") for page in pages).lower()
    return re.sub(r"[^a-z]+", " ", plain)


def tokenizer() -> Any:
    """Returns one with a token for each letter."""
    words = ["<pad>", "<eos>", "<unk>", " ", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    vocabulary = {word: index for index, word in enumerate(words)}
    letters: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=letters, padding_side="left", **named)


def base(letters: Any) -> Any:
    """Returns a model that has learned to read English, half of it in capitals."""
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        use_cache=False,
    )
    model, english = LlamaForCausalLM(config), text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(120):
        starts = torch.randint(len(english) - 40, (24,)).tolist()
        pieces = [english[start : start + 40] for start in starts]
        tokens = letters([piece.upper() if row % 2 else piece for row, piece in enumerate(pieces)], return_tensors="pt")
        optimizer.zero_grad()
        model(input_ids=tokens.input_ids, labels=tokens.input_ids).loss.backward()
        optimizer.step()
    return model.eval()


def pairs() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns prompts with the wanted and the unwanted continuation, to train on and held out."""
    words = text().split()
    rows = []
    for place in range(0, 280 * 2 * WORDS, 2 * WORDS):
        prompt, following = (" ".join(words[at : at + WORDS]) for at in (place, place + WORDS))
        rows.append({"prompt": prompt, "chosen": f" {following.upper()}", "rejected": f" {following}"})
    return rows[:200], rows[200:]


@torch.no_grad()
def share_in_capitals(model: Any, letters: Any, rows: list[dict[str, str]]) -> float:
    return sum(
        log_likelihood(model, letters, row, "chosen") > log_likelihood(model, letters, row, "rejected") for row in rows
    ) / len(rows)


def log_likelihood(model: Any, letters: Any, row: dict[str, str], which: str) -> float:
    prompt = letters(row["prompt"], return_tensors="pt").input_ids
    tokens = letters(row["prompt"] + row[which], return_tensors="pt").input_ids
    likelihoods = model(input_ids=tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])
    return likelihoods[prompt.shape[1] - 1 :].sum().item()


def main() -> Result:
    """Trains the base and the adapter, and returns the figures."""
    torch.manual_seed(0)
    letters = tokenizer()
    model = base(letters)
    seen, held_out = pairs()
    before = share_in_capitals(model, letters, held_out)
    config = graphpeft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = graphpeft.get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder,
            max_steps=40,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            report_to=[],
        )
        rows = datasets.Dataset.from_list(seen)
        trainer = trl.DPOTrainer(model=model, args=settings, train_dataset=rows, processing_class=letters)
        trainer.remove_callback(PrinterCallback)  # it prints each step
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    after = share_in_capitals(model.eval(), letters, held_out)
    return Result(before, after, losses[0], list(model.peft_config))


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = main()
    print(f"prompts that go on in capitals: {result.before:.1%} before, {result.after:.1%} after")
    print(f"the first loss is {result.first_loss:.4f}, and ln 2 is {math.log(2):.4f}; adapters: {result.adapters}")
