"""Lily, whose layers share factors."""

import peft
import torch
from kinds import MATRIX, ROUNDED
from oracle import LINEAR, TRANSPOSED, WITHOUT_BIAS, Case
from torch import Tensor, nn

from contracts.contract import Contract
from graphpeft import LilyConfig


class Block(nn.Module):
    """Two layers of one shape, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)) * torch.sigmoid(self.gate(x)))


def blocks(count: int = 5) -> nn.Module:
    """Returns so many of them."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count)))


BLOCKS = Case("blocks", blocks, lambda: (torch.randn(2, 3, 6),), {"target_modules": ["up", "gate"]})
REFUSES = {
    "both ways": "its operations read it both as",
    "merge": "mixes its factors by what goes into a layer",
    "rows": "depends on all rows of its batch",
    "before dora": "reads weight with the changes so far",
}
OPTIONS = {"r": 3, "num_B": 2, "scaling": 0.7}
CASES = (LINEAR, WITHOUT_BIAS)

CONTRACTS = [
    Contract("lily", LilyConfig, peft.LilyConfig, OPTIONS, CASES, (TRANSPOSED, MATRIX, ROUNDED), refuses=REFUSES),
    Contract("lily-drawn", LilyConfig, peft.LilyConfig, OPTIONS | {"init_weights": False}, CASES[:1], refuses=REFUSES),
    Contract(
        "lily-shared",
        LilyConfig,
        peft.LilyConfig,
        OPTIONS | {"num_B": 3, "stride_A": 2},
        CASES[:1],
        (BLOCKS,),
        refuses=REFUSES,
    ),
]
