"""VeRA, with its projections in files and without."""

import peft
from kinds import ROUNDED
from matrix_uses import ATTENTION, LAYERS, USES
from oracle import LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import VeraConfig

CONTRACTS = [
    Contract(
        "vera",
        VeraConfig,
        peft.VeraConfig,
        {"r": 3, "d_initial": 0.5},
        (LINEAR, WITHOUT_BIAS, TRANSPOSED, LAYERS),
        beyond=(USES, ATTENTION, ROUNDED),
    ),
    Contract(
        "vera-drawn", VeraConfig, peft.VeraConfig, {"r": 3, "init_weights": False, "bias": "vera_only"}, (LAYERS,)
    ),
    Contract("vera-dropout", VeraConfig, peft.VeraConfig, {"r": 3, "vera_dropout": 0.4}, (LAYERS,)),
    Contract("vera-unsaved", VeraConfig, peft.VeraConfig, {"r": 3, "save_projection": False}, (LINEAR, LAYERS)),
]
