"""Adapts a model to two tasks, exports it to ONNX with adapters as inputs, and lets `serve.py` run it.

    train a base ─▶ adapt it twice ─▶ export once ─▶ serve with onnxruntime, swapping adapters

The images are scikit-learn's scans of handwritten digits. The base reads them upright; one adapter reads them upside
down, the other one mirrored. `serve.py` imports NumPy and onnxruntime alone: it knows neither PyTorch nor this library.
Nothing is downloaded. Takes about 15 s on one core. Run it with ``python examples/ship.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

import graphpeft

SERVE = Path(__file__).with_name("serve.py")

TURNED = {"upside_down": (2, 3), "mirrored": (3,)}
"""Each adapter's task: the dimensions of images that are turned round."""

STEPS = 200


class Data(NamedTuple):
    """Upright images with their digits, to train on and to be judged by."""

    train_x: Tensor
    test_x: Tensor
    train_y: Tensor
    test_y: Tensor


class Shipped(NamedTuple):
    """What came of it.

    Attributes:
        accuracies: The share of digits that are read right, by adapter and task; "base" has no adapter.
        milliseconds: How long onnxruntime takes for one image, by adapter.
        bytes: The sizes of the files.
        report: What the export says of itself.
    """

    accuracies: dict[str, dict[str, float]]
    milliseconds: dict[str, float]
    bytes: dict[str, int]
    report: graphpeft.ExportReport


def digits() -> Data:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return Data(*train_test_split(x, torch.tensor(labels), test_size=0.25, random_state=0))


def turned(images: Tensor, task: str) -> Tensor:
    return images.flip(TURNED[task]) if task in TURNED else images


def train(model: nn.Module, data: Data, task: str) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3)
    model.train()
    for _ in tqdm(range(STEPS), desc=f"training for {task}", leave=False, disable=None):
        rows = torch.randint(len(data.train_x), (64,))
        loss = F.cross_entropy(model(turned(data.train_x[rows], task)), data.train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def trained(data: Data) -> Any:
    """Returns a base that reads upright digits, with an adapter for each other task."""
    torch.manual_seed(0)
    # each row of a scan is one of its tokens
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": (1, 8), "embed_dim": 48, "depth": 3, "num_heads": 4}
    model = VisionTransformer(in_chans=1, num_classes=10, **sizes)
    train(model, data, "upright")
    config = graphpeft.LoraConfig(r=4, lora_alpha=16, target_modules=["qkv", "attn.proj", "fc1", "fc2"])
    for task in TURNED:
        graphpeft.get_peft_model(model, config, task)
        model.set_adapter(task)
        train(model, data, task)
    return model


def main() -> Shipped:
    """Trains, exports and serves, and returns the numbers."""
    data = digits()
    model = trained(data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = graphpeft.export(model, (data.test_x[:16],), folder / "digits.onnx", "onnx", adapters="inputs")
        tests = {task: turned(data.test_x, task).numpy() for task in ("upright", *TURNED)}
        np.savez(folder / "tests.npz", labels=data.test_y.numpy(), **tests)
        adapters = [f"{task}={report.adapter_files[task]}" for task in TURNED]
        command = [sys.executable, str(SERVE), str(report.path), str(folder / "tests.npz"), *adapters]
        served = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        sizes = {path.name: size for path, size in report.files.items()}
    return Shipped(served["accuracies"], served["milliseconds"], sizes, report)


def table(shipped: Shipped) -> str:
    """Returns the numbers as tables."""
    tasks = ["upright", *TURNED]
    lines = [f"{'adapter':12}" + "".join(f"{task:>14}" for task in tasks) + f"{'one image':>14}"]
    for adapter, accuracies in shipped.accuracies.items():
        cells = "".join(f"{accuracies[task]:14.1%}" for task in tasks)
        lines.append(f"{adapter:12}{cells}{shipped.milliseconds[adapter]:11.3f} ms")
    lines += ["", *(f"{name:32}{size:10,} bytes" for name, size in shipped.bytes.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    shipped = main()
    print(f"{shipped.report}\n\n{table(shipped)}")
