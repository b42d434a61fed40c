"""Fine-tunes a timm ConvNeXt on digits that lie on their side, and draws what its adapter has become.

    train a base on upright digits ─▶ LoRA on convolutions and MLPs ─▶ save, load into a fresh base ─▶ a picture

The images are scikit-learn's scans of handwritten digits. The picture shows, at each adapted layer, how much the weight
changes and how large the gradients are. Takes about 15 s on one core. Run it with ``python examples/images.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import graphpeft


class Result(NamedTuple):
    """What came of it.

    Attributes:
        before: The share of digits on their side that the base reads.
        after: The same with the adapter, loaded into a fresh base.
        trainable: The share of parameters that were trained.
        picture: The page with the picture.
    """

    before: float
    after: float
    trainable: float
    picture: Path


def base() -> nn.Module:
    return timm.create_model("test_convnext", in_chans=1, num_classes=10)


def digits() -> list[Tensor]:
    """Returns images of 32 × 32 and their digits: to train on, and to be judged by."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    x = F.interpolate(x, scale_factor=4)
    train_x, test_x, train_y, test_y = train_test_split(x, torch.tensor(labels), test_size=0.25, random_state=0)
    return [train_x, train_y, test_x, test_y]


def on_their_side(images: Tensor) -> Tensor:
    return images.rot90(1, (2, 3))


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, rate: float) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (48,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(-1) == labels).float().mean().item()


def main(picture: str | Path = "build/images.html") -> Result:
    """Trains, saves, loads and draws, and returns the figures."""
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = digits()
    model = base()
    train(model, train_x, train_y, steps=80, rate=4e-3)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = accuracy(model, on_their_side(test_x), test_y)

    config = graphpeft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["conv_dw", "fc1", "fc2"], modules_to_save=["head.fc"]
    )
    model = graphpeft.get_peft_model(model, config)
    train(model, on_their_side(train_x), train_y, steps=80, rate=1e-2)
    trainable, total = model.get_nb_trainable_parameters()
    shown = graphpeft.show(model, picture)  # the gradients of the last step are still there

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fresh = base()
        fresh.load_state_dict(weights)
        loaded = graphpeft.PeftModel.from_pretrained(fresh.eval(), folder)
    return Result(before, accuracy(loaded, on_their_side(test_x), test_y), trainable / total, shown.path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = main()
    print(f"digits on their side: {result.before:.1%} read before, {result.after:.1%} after")
    print(f"trained: {result.trainable:.1%} of the parameters; the picture is {result.picture}")
