"""WaveNet, as its paper has it: dilated causal convolutions with gates, which predict the next sample of a sound.

Source: van den Oord et al., "WaveNet: A Generative Model for Raw Audio", arXiv 1609.03499.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 32
"""The number of values that a sample can have, by μ-law."""


class Causal(nn.Conv1d):
    """A convolution whose values are of no later inputs."""

    def forward(self, input: Tensor) -> Tensor:
        """Pads the beginning alone."""
        return super().forward(F.pad(input, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class GatedBlock(nn.Module):
    """z = tanh(W ∗ x) ⊙ σ(V ∗ x); a part of it goes on, and a part to the output."""

    def __init__(self, features: int, skipped: int, dilation: int) -> None:
        super().__init__()
        self.filter, self.gate = (Causal(features, features, 2, dilation=dilation) for _ in range(2))
        self.residual, self.skip = nn.Conv1d(features, features, 1), nn.Conv1d(features, skipped, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what goes on, and what goes to the output."""
        z = torch.tanh(self.filter(x)) * torch.sigmoid(self.gate(x))
        return x + self.residual(z), self.skip(z)


class WaveNet(nn.Module):
    """Stacks of blocks whose dilations double."""

    def __init__(self, features: int = 16, skipped: int = 24, layers: int = 4, stacks: int = 2) -> None:
        super().__init__()
        self.first = Causal(SAMPLES, features, 2)
        self.blocks = nn.ModuleList(
            GatedBlock(features, skipped, 2**layer) for _ in range(stacks) for layer in range(layers)
        )
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(skipped, skipped, 1), nn.ReLU(), nn.Conv1d(skipped, SAMPLES, 1))

    def forward(self, samples: Tensor) -> Tensor:
        """Returns logits of the samples that come next, (rows, values, length), for samples of shape (rows, length)."""
        x = self.first(F.one_hot(samples, SAMPLES).mT.to(self.first.weight.dtype))
        skips = []
        for block in self.blocks:
            x, skip = block(x)
            skips.append(skip)
        return self.last(torch.stack(skips).sum(0))
