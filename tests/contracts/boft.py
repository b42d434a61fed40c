"""BOFT, of one factor, as PEFT has it on a CPU."""

import peft
import torch
from kinds import ATTENTION, COMPUTED, STACK
from oracle import BACK, CONV_2D, LINEAR, POINTWISE, TRANSPOSED, WITHOUT_BIAS, Case
from torch import nn

from contracts.contract import Contract
from graphpeft import BOFTConfig

CASES = (LINEAR, WITHOUT_BIAS, POINTWISE, CONV_2D)
GROUPED = Case(
    "grouped",
    lambda: nn.Sequential(nn.Conv1d(8, 6, 3, groups=2, dilation=2, padding=2, padding_mode="circular")),
    lambda: (torch.randn(2, 8, 7),),
)
EVEN = Case("even", lambda: nn.Sequential(nn.Linear(8, 5), nn.Tanh()), lambda: (torch.randn(3, 8),))

REFUSES = {"onnx": "ONNX has no operator for aten._linalg_solve_ex"}

CONTRACTS = [
    Contract(
        "boft",
        BOFTConfig,
        peft.BOFTConfig,
        {"boft_block_size": 2},
        CASES,
        beyond=(TRANSPOSED, GROUPED, BACK, STACK, COMPUTED, ATTENTION),
        refuses=REFUSES,
    ),
    Contract(
        "boft-drawn",
        BOFTConfig,
        peft.BOFTConfig,
        {"boft_block_size": 0, "boft_block_num": 2, "init_weights": False, "bias": "boft_only"},
        CASES,
    ),
    Contract(
        "boft-butterfly",
        BOFTConfig,
        peft.BOFTConfig,
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
        (),
        beyond=(EVEN,),
    ),
]
