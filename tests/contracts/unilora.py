"""Uni-LoRA, with its places in files and without."""

import peft
from kinds import ROUNDED
from matrix_uses import ATTENTION, LAYERS, USES
from oracle import LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import UniLoraConfig

OPTIONS = {"r": 3, "theta_d_length": 11, "init_theta_d_bound": 0.5}

CONTRACTS = [
    Contract(
        "unilora",
        UniLoraConfig,
        peft.UniLoraConfig,
        OPTIONS,
        (LINEAR, WITHOUT_BIAS, TRANSPOSED, LAYERS),
        beyond=(USES, ATTENTION, ROUNDED),
    ),
    Contract("unilora-saved", UniLoraConfig, peft.UniLoraConfig, OPTIONS | {"save_indices": True}, (LINEAR, LAYERS)),
    Contract(
        "unilora-drawn",
        UniLoraConfig,
        peft.UniLoraConfig,
        {"theta_d_length": 300, "init_weights": False, "bias": "unilora_only"},
        (LAYERS,),
    ),
    Contract("unilora-dropout", UniLoraConfig, peft.UniLoraConfig, OPTIONS | {"unilora_dropout": 0.4}, (LAYERS,)),
]
