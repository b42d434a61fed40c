"""HiRA, with all of its first values."""

import peft
import torch
from oracle import BACK, BEYOND, CONV_1D, CONV_2D, CONV_3D, EMBEDDING, MATRICES, POINTWISE, Case
from torch import nn

from contracts.contract import Contract
from graphpeft import HiraConfig

CASES = (*MATRICES, CONV_1D, CONV_2D, POINTWISE, CONV_3D, EMBEDDING)
GROUPED = Case(
    "grouped",
    lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular")),
    lambda: (torch.randn(2, 4, 5, 5),),
)

CONTRACTS = [
    Contract("hira", HiraConfig, peft.HiraConfig, {"r": 3}, CASES, beyond=(*BEYOND, BACK)),
    Contract("hira-dropout", HiraConfig, peft.HiraConfig, {"r": 2, "hira_dropout": 0.2}, CASES[:-1]),
    Contract(
        "hira-gaussian", HiraConfig, peft.HiraConfig, {"r": 2, "init_weights": "gaussian"}, CASES, beyond=(GROUPED,)
    ),
    Contract("hira-drawn", HiraConfig, peft.HiraConfig, {"r": 2, "init_weights": False}, CASES),
]
