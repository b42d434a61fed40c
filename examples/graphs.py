"""Adapts a hand-written graph network, whose weights are plain parameters, to features in another order.

    messages along edges: h ← relu(mean over neighbours of h W + h U) ─▶ LoRA on W and U, which no layer holds

The nodes are scikit-learn's scans of handwritten digits, and edges lead to the five most similar ones. The base learns
from a tenth of the labels. Then all scans are turned upside down, which leaves the edges as they are. Takes about 10 s
on one core. Run it with ``python examples/graphs.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn

import graphpeft


class Result(NamedTuple):
    """What came of it.

    Attributes:
        before: The share of unlabelled nodes that the base classifies right when scans are upside down.
        after: The same with the adapter.
        upright: The share that is right on upright scans while the adapter is disabled.
        trained: The number of parameters that were trained.
    """

    before: float
    after: float
    upright: float
    trained: int


class Messages(nn.Module):
    """A layer: what neighbours send, averaged, and what a node keeps."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.sent = nn.Parameter(torch.randn(width_in, width_out) / width_in**0.5)
        self.kept = nn.Parameter(torch.randn(width_in, width_out) / width_in**0.5)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        sent = nodes @ self.sent
        received = torch.zeros_like(sent).index_add(0, target, sent[source])
        degree = torch.zeros_like(sent[:, :1]).index_add(0, target, torch.ones_like(sent[source, :1]))
        return received / degree.clamp(min=1) + nodes @ self.kept


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Messages(64, 64), Messages(64, 64)])
        self.head = nn.Linear(64, 10)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            nodes = F.relu(layer(nodes, edges))
        return self.head(nodes)


def train(model: nn.Module, nodes: Tensor, edges: Tensor, labels: Tensor, known: Tensor, rate: float) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(nodes, edges)[known], labels[known]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, nodes: Tensor, edges: Tensor, labels: Tensor, known: Tensor) -> float:
    right = model(nodes, edges).argmax(-1) == labels
    return right[~known].float().mean().item()


def main() -> Result:
    """Trains the base and the adapter, and returns the figures."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    nearest = kneighbors_graph(images, 5).tocoo()
    edges = torch.stack([torch.tensor(nearest.col), torch.tensor(nearest.row)]).long()
    nodes, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digits)
    turned = nodes.flip(1)  # of a scan's 64 pixels, the last is then the first
    known = torch.rand(len(nodes)) < 0.1

    model = Network()
    train(model, nodes, edges, labels, known, rate=1e-2)
    before = accuracy(model, turned, edges, labels, known)

    config = graphpeft.LoraConfig(r=8, lora_alpha=16, target_modules=["sent", "kept"])
    model = graphpeft.get_peft_model(model, config, example_inputs=(nodes, edges))
    train(model, turned, edges, labels, known, rate=2e-2)
    after = accuracy(model, turned, edges, labels, known)
    with model.disable_adapter():
        upright = accuracy(model, nodes, edges, labels, known)
    return Result(before, after, upright, model.get_nb_trainable_parameters()[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = main()
    print(f"upside down: {result.before:.1%} of the unlabelled nodes right before, {result.after:.1%} after")
    print(f"trained: {result.trained:,} parameters; upright, without the adapter: {result.upright:.1%}")
