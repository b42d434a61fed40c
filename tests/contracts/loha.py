"""LoHa, with cores and without."""

import peft
from kinds import KERNELS
from matrix_uses import ATTENTION
from oracle import CONV_1D, CONV_2D, GROUPED, LINEAR, POINTWISE, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import LoHaConfig

OPTIONS = {"r": 2, "alpha": 3}
CASES = (LINEAR, WITHOUT_BIAS, CONV_1D, CONV_2D, POINTWISE)

CONTRACTS = [
    Contract("loha", LoHaConfig, peft.LoHaConfig, OPTIONS, CASES, (GROUPED, KERNELS, ATTENTION), trains_alike=False),
    Contract(
        "loha-drawn", LoHaConfig, peft.LoHaConfig, OPTIONS | {"init_weights": False}, CASES[:1], trains_alike=False
    ),
    Contract(
        "loha-cores",
        LoHaConfig,
        peft.LoHaConfig,
        OPTIONS | {"use_effective_conv2d": True},
        CASES,
        (KERNELS,),
        trains_alike=False,
    ),
]
