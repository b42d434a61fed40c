"""MiSS, with one block, a small one, and blocks that multiply the weight."""

import peft
from oracle import ATTENTION, BEYOND, CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import MissConfig

CASES = (LINEAR, WITHOUT_BIAS)
OPTIONS = {
    "miss": {"r": 4},
    "miss-drawn": {"r": 2, "init_weights": False, "miss_dropout": 0.3, "bias": "MiSS_only"},
    "miss-mini": {"r": 4, "init_weights": "mini", "mini_r": 2},
    "miss-bat": {"r": 2, "init_weights": "bat"},
}
BEYOND_OF = {
    "miss": (*BEYOND, TRANSPOSED, CONV_2D),
    "miss-mini": (*BEYOND, TRANSPOSED, CONV_2D),
    "miss-bat": (ATTENTION, TRANSPOSED),
}

CONTRACTS = [
    Contract(name, MissConfig, peft.MissConfig, options, CASES, beyond=BEYOND_OF.get(name, ()))
    for name, options in OPTIONS.items()
]
