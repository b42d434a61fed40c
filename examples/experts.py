"""Adapts the experts of a mixture, a small Qwen3-MoE of Transformers, from scikit-learn's English to its Python.

    train a base on English ─▶ LoRA on the stacks of all experts and on attention ─▶ predict Python

The texts are descriptions and modules of scikit-learn, one character at a time. The experts' weights are parameters of
three dimensions; each expert gets an adapter of its own. Takes about 25 s on one core. Run it with
``python examples/experts.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import sklearn
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import graphpeft

LENGTH = 48  # characters that the model sees


class Result(NamedTuple):
    """What came of it.

    Attributes:
        before: The share of the characters of held-out Python that the base predicts.
        after: The same with the adapter.
        experts: The number of experts that have an adapter, in all layers.
        trainable: The share of parameters that were trained.
    """

    before: float
    after: float
    experts: int
    trainable: float


def base(characters: int) -> nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=characters,
        hidden_size=64,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config)


def texts() -> tuple[str, str]:
    """Returns the English that describes scikit-learn's data sets, and the Python of its linear models."""
    package = Path(sklearn.__file__).parent
    descriptions = sorted(package.glob("datasets/descr/*.rst"))
    modules = sorted(package.glob("linear_model/*.py"))
    english, python = (
        "\n".join(file.read_text(encoding="utf-8") for file in files) for files in (descriptions, modules)
    )
    return english, python


def windows(text: str, alphabet: str) -> Tensor:
    number = {character: index for index, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in text]).unfold(0, LENGTH + 1, LENGTH + 1)


def scores_and_next(model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    return model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()


def train(model: nn.Module, rows: Tensor, steps: int, rate: float) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(*scores_and_next(model, rows[torch.randint(len(rows), (32,))])).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, rows: Tensor) -> float:
    scores, following = scores_and_next(model, rows)
    return (scores.argmax(-1) == following).float().mean().item()


def main() -> Result:
    """Trains the base and the adapter, and returns the figures."""
    torch.manual_seed(0)
    english, python = texts()
    alphabet = "".join(sorted({*english, *python}))
    model = base(len(alphabet))
    train(model, windows(english, alphabet), steps=160, rate=1e-2)
    rows = windows(python, alphabet)
    seen, unseen = rows[:-300], rows[-300:]
    before = accuracy(model, unseen)

    config = graphpeft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model = graphpeft.get_peft_model(model, config)
    report = model.adapter_report()
    stacks = [adapted.site for adapted in report.adapted if adapted.site.label.endswith("down_proj")]
    experts = sum(len(model.get_parameter(site.label)) for site in stacks)
    train(model, seen, steps=260, rate=1e-2)
    trainable, total = model.get_nb_trainable_parameters()
    return Result(before, accuracy(model, unseen), experts, trainable / total)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = main()
    print(f"characters of Python: {result.before:.1%} predicted before, {result.after:.1%} after")
    print(f"trained: {result.trainable:.1%} of the parameters, at {result.experts} experts")
