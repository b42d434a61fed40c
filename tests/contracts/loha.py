"""LoHa, with cores and without."""

import peft
from oracle import CONV_1D, CONV_2D, GROUPED, LINEAR, POINTWISE, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import LoHaConfig

OPTIONS = {"r": 2, "alpha": 3}
CASES = (LINEAR, WITHOUT_BIAS, CONV_1D, CONV_2D, POINTWISE)

CONTRACTS = [
    Contract("loha", LoHaConfig, peft.LoHaConfig, OPTIONS, CASES, beyond=(GROUPED,), trains_alike=False),
    Contract(
        "loha-drawn", LoHaConfig, peft.LoHaConfig, OPTIONS | {"init_weights": False}, CASES[:1], trains_alike=False
    ),
    Contract(
        "loha-cores", LoHaConfig, peft.LoHaConfig, OPTIONS | {"use_effective_conv2d": True}, CASES, trains_alike=False
    ),
]
