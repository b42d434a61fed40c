"""DeLoRA."""

import peft
from oracle import BEYOND, CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import DeloraConfig

CASES = (LINEAR, WITHOUT_BIAS)
OPTIONS = {
    "delora": {"delora_lambda": 3},
    "delora-drawn": {"init_weights": False, "module_dropout": 0.3},
    "delora-patterns": {"rank_pattern": {"0": 3}, "lambda_pattern": {"0": 7}, "bias": "delora_only"},
}

CONTRACTS = [
    Contract(
        name,
        DeloraConfig,
        peft.DeloraConfig,
        {"r": 2, **options},
        CASES,
        beyond=(*BEYOND, TRANSPOSED, CONV_2D) if name == "delora" else (),
    )
    for name, options in OPTIONS.items()
]
