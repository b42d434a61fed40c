"""C³A."""

import peft
from oracle import ATTENTION, CONV_1D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import C3AConfig

CASES = (LINEAR, WITHOUT_BIAS)
BEYOND = (CONV_1D, ATTENTION, TRANSPOSED)
KINDS = {"c3a": "xavier_uniform", "c3a-gaussian": "gaussian", "c3a-kaiming": "kaiming_uniform", "c3a-zero": True}

CONTRACTS = [
    Contract(
        name,
        C3AConfig,
        peft.C3AConfig,
        {"block_size": 2, "init_weights": kind},
        CASES,
        beyond=BEYOND if name == "c3a" else (),
    )
    for name, kind in KINDS.items()
]
