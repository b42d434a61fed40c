"""Models whose matrices are of several sizes, and are used in all the ways in which a method can adapt a matrix."""

from __future__ import annotations

import torch
from oracle import Case
from torch import Tensor, nn


class Layers(nn.Sequential):
    """Layers of several sizes."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False), nn.Tanh(), nn.Linear(4, 10))


class Uses(nn.Module):
    """Weights that PEFT's linear layers can't adapt: of convolutions, stacks of experts, and plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv1d(8, 8, 3, groups=2)
        self.turned = nn.ConvTranspose1d(8, 6, 2, groups=2)
        self.w, self.experts = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(3, 4, 6))
        self.named = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.turned(self.grouped(self.one(x).tanh()).tanh()).tanh() @ self.w
        h = torch.einsum("bcd,edf->bcf", h, self.experts)
        return torch.einsum("bcd,do->bco", h, self.named)


def _attention() -> nn.Module:
    # its queries, keys and values have one weight, which PyTorch reads by a function of its own
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))


LAYERS = Case("layers", Layers, lambda: (torch.randn(4, 3, 6),), {"target_modules": ["0", "2", "4"]})
USES = Case(
    "uses",
    Uses,
    lambda: (torch.randn(2, 4, 9),),
    {"target_modules": ["one", "grouped", "turned", "w", "experts", "named"]},
)
ATTENTION = Case("attention", _attention, lambda: (torch.randn(2, 5, 8),), {"target_modules": ["self_attn", "linear1"]})

TARGETS = LAYERS.targets["target_modules"]


def build() -> nn.Module:
    """Returns the model of `LAYERS`."""
    return LAYERS.build()


def inputs() -> Tensor:
    """Returns its input."""
    return LAYERS.inputs()[0]
