"""Adapts three models to what they haven't seen, and reads the adapters back with standard PEFT.

    train a base ─▶ adapt it with LoRA to another task ─▶ save ─▶ load into a fresh base, with graphpeft and with PEFT

The models are a timm vision transformer, a hand-written network that uses its weights functionally, and a Llama of
Transformers. The images are scikit-learn's scans of handwritten digits: the bases learn 0 to 4, the adapters 5 to 9.
The text is scikit-learn's, too: the base learns the English of its descriptions, the adapter the Python of its linear
models, one character at a time. Nothing is downloaded. Takes about 40 s on one core. Run it with `make demo`.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import peft
import sklearn
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from graphpeft import LoraConfig, PeftModel, TaskType, get_peft_model

CONTEXT = 48  # characters that the language model sees
HELD_OUT = 512  # windows of a text that the language model is judged by


class Task(NamedTuple):
    """Inputs and their right answers, to train on and to be judged by."""

    train_x: Tensor
    test_x: Tensor
    train_y: Tensor
    test_y: Tensor


class Training(NamedTuple):
    """How long, and how fast."""

    steps: int
    learning_rate: float


@dataclass
class Case:
    """A model, what its base learns, and what it is adapted to."""

    name: str
    build: Callable[[], nn.Module]
    known: Task
    unseen: Task
    config: LoraConfig
    base_training: Training
    adapter_training: Training


class Result(NamedTuple):
    """A row of the table; the accuracies are those on the held-out part of the unseen task."""

    name: str
    before: float
    after: float
    trainable_share: float
    file_size: int
    difference: float


# three models


def vision_transformer() -> nn.Module:
    """A small timm ViT; each row of a scan is one of its tokens."""
    return VisionTransformer(
        img_size=8, patch_size=(1, 8), in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4
    )


class FunctionalBlock(nn.Module):
    """x + gelu(x Uᵀ) D: both matrices are plain parameters, and no module holds them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(hidden, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(hidden, width) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(F.linear(x, self.up)) @ self.down


class FunctionalNetwork(nn.Module):
    """A residual network of such blocks."""

    def __init__(self, pixels: int = 64, width: int = 64, hidden: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(pixels, width)
        self.blocks = nn.Sequential(*(FunctionalBlock(width, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(images.flatten(1)))))


def llama(characters: int) -> nn.Module:
    """A small Llama over characters."""
    config = LlamaConfig(
        vocab_size=characters,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


# their data


def digits(lowest: int, highest: int) -> Task:
    """The scans of some digits; a quarter is held out."""
    images, labels = load_digits(return_X_y=True)
    chosen = (labels >= lowest) & (labels <= highest)
    x = (torch.tensor(images[chosen], dtype=torch.float32).view(-1, 1, 8, 8) - 5) / 6
    y = torch.tensor(labels[chosen])
    return Task(*train_test_split(x, y, test_size=0.25, random_state=0, stratify=y))


def texts() -> tuple[str, str]:
    """The English that describes scikit-learn's data sets, and the Python of its linear models."""
    package = Path(sklearn.__file__).parent
    descriptions = sorted(package.glob("datasets/descr/*.rst"))
    modules = sorted(package.glob("linear_model/*.py"))
    english, python = (
        "\n".join(file.read_text(encoding="utf-8") for file in files) for files in (descriptions, modules)
    )
    return english, python


def next_characters(text: str, alphabet: str) -> Task:
    """Windows of a text, and the character after each of theirs; some of the text's end are held out."""
    number = {character: index for index, character in enumerate(alphabet)}
    numbers = torch.tensor([number[character] for character in text])
    held_out = min(len(numbers) // 8, HELD_OUT * (CONTEXT + 1))
    train = numbers[:-held_out].unfold(0, CONTEXT + 1, 1)
    test = numbers[-held_out:].unfold(0, CONTEXT + 1, CONTEXT + 1)
    return Task(train[:, :-1], test[:, :-1], train[:, 1:], test[:, 1:])


def cases() -> list[Case]:
    """The three, with their configs."""
    english, python = texts()
    alphabet = "".join(sorted({*english, *python}))
    return [
        Case(
            "timm VisionTransformer",
            vision_transformer,
            known=digits(0, 4),
            unseen=digits(5, 9),
            config=LoraConfig(
                r=4,
                lora_alpha=8,
                target_modules=["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
                modules_to_save=["head"],
            ),
            base_training=Training(steps=120, learning_rate=3e-3),
            adapter_training=Training(steps=100, learning_rate=5e-3),
        ),
        Case(
            "functional weights",
            FunctionalNetwork,
            known=digits(0, 4),
            unseen=digits(5, 9),
            config=LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"], modules_to_save=["head"]),
            base_training=Training(steps=300, learning_rate=3e-3),
            adapter_training=Training(steps=200, learning_rate=5e-3),
        ),
        Case(
            "Transformers Llama",
            lambda: llama(len(alphabet)),
            known=next_characters(english, alphabet),
            unseen=next_characters(python, alphabet),
            config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=TaskType.CAUSAL_LM),
            base_training=Training(steps=180, learning_rate=5e-3),
            adapter_training=Training(steps=300, learning_rate=1e-2),
        ),
    ]


# the way from a base to its adapter and back


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The model's scores of the classes, or of the characters."""
    output = model(x)
    return output if isinstance(output, Tensor) else output.logits


def train(model: nn.Module, task: Task, training: Training, title: str) -> None:
    """Trains whatever requires grad, on random batches."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=training.steps)
    model.train()
    for _ in tqdm(range(training.steps), desc=f"{title:<44}", unit="step"):
        batch = torch.randint(len(task.train_x), (32,))
        scores = logits(model, task.train_x[batch])
        loss = F.cross_entropy(scores.flatten(0, -2), task.train_y[batch].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """The share of right answers on the held-out part."""
    right = logits(model, task.test_x).argmax(-1) == task.test_y
    return right.float().mean().item()


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """How far the scores of two models are apart."""
    return (logits(one, x) - logits(other, x)).abs().max().item()


def adapt(case: Case) -> Result:
    """Takes one case all the way."""
    torch.manual_seed(0)
    model = case.build()
    train(model, case.known, case.base_training, f"{case.name}: train the base")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = accuracy(model, case.unseen)

    model = get_peft_model(model, case.config)
    train(model, case.unseen, case.adapter_training, f"{case.name}: train the adapter")
    trainable, total = model.get_nb_trainable_parameters()

    def fresh_base() -> nn.Module:
        fresh = case.build()
        fresh.load_state_dict(base)
        return fresh

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file_size = Path(folder, "adapter_model.safetensors").stat().st_size
        ours = PeftModel.from_pretrained(fresh_base(), folder)
        theirs = peft.PeftModel.from_pretrained(fresh_base(), folder).eval()
    assert largest_difference(model, ours, case.unseen.test_x) == 0, "an adapter changed on its way through the file"
    return Result(
        name=case.name,
        before=before,
        after=accuracy(ours, case.unseen),
        trainable_share=trainable / total,
        file_size=file_size,
        difference=largest_difference(ours, theirs, case.unseen.test_x),
    )


def table(results: list[Result]) -> str:
    """The results, aligned."""
    header = ("model", "before", "after", "trainable", "adapter file", "graphpeft − PEFT")
    rows = [
        (
            result.name,
            f"{result.before:.1%}",
            f"{result.after:.1%}",
            f"{result.trainable_share:.2%}",
            f"{result.file_size / 1024:.1f} KiB",
            f"{result.difference:.1e}",
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["─" * width for width in widths], *rows]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def main() -> list[Result]:
    """Runs all cases and prints the table."""
    # PEFT asks transformers for this attribute by its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    results = [adapt(case) for case in cases()]
    print()
    print("Accuracy on held-out data of the task that the base hasn't seen, before and after adapting;")
    print("the share of parameters that were trained; the adapter's file; and the largest difference between the")
    print("outputs of graphpeft and of PEFT, each with that file loaded into a fresh base.")
    print()
    print(table(results))
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # models this small gain nothing from more, and lose where other work runs
    main()
