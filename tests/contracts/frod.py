"""FRoD, with what layers share in files and not, and with few places and all."""

import peft
from matrix_uses import ATTENTION, LAYERS, USES
from oracle import CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import FrodConfig

BASE = {"progressbar": False}
OPTIONS = {
    "frod-drawn": {"init_weights": False, "sparse_rate": 0.3, "projection_prng_key": 5},
    "frod-unsaved": {"save_projection": False, "sparse_rate": 0.2},
    "frod-dropout": {"frod_dropout": 0.4, "sparse_rate": 1.0},
}

CONTRACTS = [
    Contract(
        "frod",
        FrodConfig,
        peft.FrodConfig,
        BASE,
        (LINEAR, WITHOUT_BIAS, TRANSPOSED, LAYERS),
        beyond=(CONV_2D, USES, ATTENTION),
    ),
    *(Contract(name, FrodConfig, peft.FrodConfig, BASE | options, (LAYERS,)) for name, options in OPTIONS.items()),
]
