"""BEFT, at layers with a bias and without."""

import peft
from oracle import BACK, CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import BeftConfig

NO_BIAS = "it has no bias, into which another could be merged"

CONTRACTS = [
    Contract(
        "beft",
        BeftConfig,
        peft.BeftConfig,
        {},
        (LINEAR,),
        (TRANSPOSED, CONV_2D, BACK),
        refuses={"merge llama": NO_BIAS, "both ways": "its operations read it both as"},
    ),
    Contract("beft-drawn", BeftConfig, peft.BeftConfig, {"init_weights": False}, (LINEAR,)),
    Contract("beft-without-bias", BeftConfig, peft.BeftConfig, {}, (WITHOUT_BIAS,), refuses={"merge": NO_BIAS}),
]
