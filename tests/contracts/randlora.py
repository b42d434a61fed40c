"""RandLoRA, with projections of numbers and of signs, in files and not."""

import peft
from kinds import ROUNDED
from matrix_uses import ATTENTION, LAYERS, USES
from oracle import LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import RandLoraConfig

OPTIONS = {"r": 3, "randlora_alpha": 4, "init_weights": False}

CONTRACTS = [
    Contract(
        "randlora",
        RandLoraConfig,
        peft.RandLoraConfig,
        {"r": 3, "randlora_alpha": 7},
        (LINEAR, WITHOUT_BIAS, TRANSPOSED, LAYERS),
        beyond=(USES, ATTENTION, ROUNDED),
    ),
    Contract("randlora-drawn", RandLoraConfig, peft.RandLoraConfig, OPTIONS | {"bias": "all"}, (LAYERS,)),
    Contract("randlora-sparse", RandLoraConfig, peft.RandLoraConfig, OPTIONS | {"sparse": True}, (LAYERS,)),
    Contract("randlora-very-sparse", RandLoraConfig, peft.RandLoraConfig, OPTIONS | {"very_sparse": True}, (LAYERS,)),
    Contract("randlora-unsaved", RandLoraConfig, peft.RandLoraConfig, OPTIONS | {"save_projection": False}, (LAYERS,)),
]
