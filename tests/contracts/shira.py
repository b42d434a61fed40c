"""SHiRA."""

import peft
from oracle import BEYOND, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import ShiraConfig

CASES = (LINEAR, WITHOUT_BIAS)

CONTRACTS = [
    Contract("shira", ShiraConfig, peft.ShiraConfig, {"r": 1}, CASES, beyond=(*BEYOND, TRANSPOSED)),
    Contract("shira-seeded", ShiraConfig, peft.ShiraConfig, {"r": 2, "random_seed": 5}, CASES),
    Contract("shira-drawn", ShiraConfig, peft.ShiraConfig, {"r": 1, "init_weights": False}, CASES[:1]),
]
