"""Super-Tuning, alone and with a product of low rank."""

import peft
from oracle import BEYOND, CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import SupertuningConfig

CASES = (LINEAR, WITHOUT_BIAS)
OPTIONS = {
    "supertuning": {"sparsity": 0.8},
    "supertuning-bottom": {"sparsity": 0.5, "select_top": False, "init_weights": False},
    "supertuning-supra": {"sparsity": 0.8, "r": 2},
    "supertuning-supra-drawn": {"sparsity": 0.8, "r": 3, "lora_alpha": 5, "lora_dropout": 0.4, "init_weights": False},
}

CONTRACTS = [
    Contract(
        name,
        SupertuningConfig,
        peft.SupertuningConfig,
        options,
        CASES,
        beyond=(*BEYOND, TRANSPOSED, CONV_2D) if name in ("supertuning", "supertuning-supra") else (),
    )
    for name, options in OPTIONS.items()
]
