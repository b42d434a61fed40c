"""PVeRA, with its projections in files and without."""

import peft
from kinds import MATRIX, ROUNDED
from matrix_uses import LAYERS
from oracle import LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import PveraConfig

CONTRACTS = [
    Contract(
        "pvera",
        PveraConfig,
        peft.PveraConfig,
        {"r": 3, "d_initial": 0.5},
        (LINEAR, WITHOUT_BIAS, TRANSPOSED, LAYERS),
        beyond=(MATRIX, ROUNDED),
        refuses={"both ways": "gives each input its own noise"},
    ),
    Contract(
        "pvera-drawn", PveraConfig, peft.PveraConfig, {"r": 3, "init_weights": False, "bias": "pvera_only"}, (LAYERS,)
    ),
    Contract("pvera-dropout", PveraConfig, peft.PveraConfig, {"r": 3, "pvera_dropout": 0.4}, (LAYERS,)),
    Contract("pvera-unsaved", PveraConfig, peft.PveraConfig, {"r": 3, "save_projection": False}, (LINEAR, LAYERS)),
]
