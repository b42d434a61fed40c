"""PEANuT, of any depth."""

import peft
from oracle import BEYOND, CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import PeanutConfig

CASES = (LINEAR, WITHOUT_BIAS)
OPTIONS = {
    "peanut": {"depth": 1, "scaling": 3.0},
    "peanut-deep": {"depth": 2, "act_fn": "gelu", "init_weights": False},
    "peanut-shallow": {},
}

CONTRACTS = [
    Contract(
        name,
        PeanutConfig,
        peft.PeanutConfig,
        {"r": 2, **options},
        CASES,
        beyond=(*BEYOND, TRANSPOSED, CONV_2D) if name == "peanut" else (),
    )
    for name, options in OPTIONS.items()
]
