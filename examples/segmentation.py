"""Adapts a SegFormer of Transformers, which labels the pixels of dark digits, to faint digits on dark paper.

    train a base ─▶ LoRA on attention, MLPs and the decoder's convolution ─▶ merge

Each canvas has four of scikit-learn's scans of handwritten digits, 0 to 3; a pixel's label is its digit, or that it has
no ink.
Merged into the weights, the adapter costs nothing. Takes about 20 s on one core. Run it with
``python examples/segmentation.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import graphpeft

DIGITS = 4
PAPER = DIGITS
"""The label of a pixel without ink."""


class Result(NamedTuple):
    """What came of it.

    Attributes:
        before: The share of inked pixels that the base labels right on dark paper.
        after: The same with the adapter.
        trainable: The share of parameters that were trained.
        merged: The greatest difference of a score that merging makes.
    """

    before: float
    after: float
    trainable: float
    merged: float


def base() -> nn.Module:
    config = SegformerConfig(
        num_channels=1,
        num_labels=PAPER + 1,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[32, 64],
        patch_sizes=[3, 3],
        strides=[1, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=64,
        classifier_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    return SegformerForSemanticSegmentation(config)


def canvases(count: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """Returns images of (count, 1, 16, 16) with four digits each, and the labels of their pixels."""
    images, labels = load_digits(n_class=DIGITS, return_X_y=True)
    chosen = slice(-180, None) if held_out else slice(-180)
    scans, digits = torch.tensor(images[chosen], dtype=torch.float32), torch.tensor(labels[chosen])
    drawn = torch.randint(len(scans), (count, 2, 2))
    ink = scans[drawn].reshape(count, 2, 2, 8, 8).transpose(2, 3).reshape(count, 1, 16, 16) / 16
    digit = digits[drawn].repeat_interleave(8, 1).repeat_interleave(8, 2)
    return ink * 2 - 1, torch.where(ink[:, 0] > 0.25, digit, PAPER)


def on_dark_paper(images: Tensor) -> Tensor:
    return 0.5 - 0.5 * images


def train(model: nn.Module, seen: object, steps: int, rate: float) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        images, labels = canvases(16, held_out=False)
        optimizer.zero_grad()
        F.cross_entropy(model(seen(images)).logits, labels).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    right = model(images).logits.argmax(1) == labels
    return right[labels != PAPER].float().mean().item()


def main() -> Result:
    """Trains the base and the adapter, and returns the figures."""
    torch.manual_seed(0)
    model = base()
    train(model, lambda images: images, steps=160, rate=5e-3)
    images, labels = canvases(100, held_out=True)
    images = on_dark_paper(images)
    before = accuracy(model, images, labels)

    # as a string it is a pattern for whole names, which fits those of older versions of Transformers, too
    layers = r".*(proj|query|key|value|fc\d|dense\d?|linear_fuse)"
    model = graphpeft.get_peft_model(model, graphpeft.LoraConfig(r=8, lora_alpha=16, target_modules=layers))
    train(model, on_dark_paper, steps=120, rate=1e-2)
    after = accuracy(model, images, labels)
    trainable, total = model.get_nb_trainable_parameters()
    with torch.no_grad():
        scores = model(images).logits
        merged = model.merge_and_unload()(images).logits
    return Result(before, after, trainable / total, (merged - scores).abs().max().item())


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = main()
    print(f"inked pixels on dark paper: {result.before:.1%} right before, {result.after:.1%} after")
    print(f"trained: {result.trainable:.1%} of the parameters; merging moves a score by {result.merged:.1e} at most")
