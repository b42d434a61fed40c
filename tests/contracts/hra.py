"""HRA, with an even and an odd number of reflections, and with orthonormal vectors."""

import peft
import torch
from oracle import BACK, BEYOND, CONV_2D, LINEAR, POINTWISE, TRANSPOSED, WITHOUT_BIAS, Case
from torch import nn

from contracts.contract import Contract
from graphpeft import HRAConfig

CASES = (LINEAR, WITHOUT_BIAS, CONV_2D, POINTWISE)
GROUPED = Case(
    "grouped",
    lambda: nn.Sequential(nn.Conv2d(4, 6, (3, 1), groups=2, dilation=(1, 2), padding=(1, 0), padding_mode="circular")),
    lambda: (torch.randn(2, 4, 5, 5),),
)

CONTRACTS = [
    Contract("hra", HRAConfig, peft.HRAConfig, {"r": 4}, CASES, beyond=(*BEYOND, TRANSPOSED, GROUPED, BACK)),
    Contract("hra-odd", HRAConfig, peft.HRAConfig, {"r": 3, "bias": "hra_only"}, CASES),
    Contract("hra-orthonormal", HRAConfig, peft.HRAConfig, {"r": 4, "apply_GS": True, "init_weights": False}, CASES),
]
