"""LN tuning."""

import peft
import torch
from oracle import LINEAR, Case
from torch import nn

from contracts.contract import Contract
from graphpeft import LNTuningConfig

NORM = Case("norm", lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)), lambda: (torch.randn(4, 3, 6),))

CONTRACTS = [
    Contract(
        "ln-tuning",
        LNTuningConfig,
        peft.LNTuningConfig,
        {},
        (LINEAR, NORM),
        llama={"target_modules": ["input_layernorm", "norm"]},
        sized={"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]},
        refuses={
            "both ways": "nothing in Sequential matches",
            "together": "both fully train 0; only one of them can be active",
            "merge beside": r"has another tensor, or other rows, in the place of 0\.weight",
        },
    ),
]
