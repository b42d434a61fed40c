"""LoKr, with one or both matrices of its product decomposed, and with cores."""

import peft
from kinds import KERNELS
from oracle import CONV_1D, CONV_2D, GROUPED, LINEAR, POINTWISE, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import LoKrConfig

CASES = (LINEAR, WITHOUT_BIAS, CONV_1D, CONV_2D, POINTWISE)
OPTIONS = {
    "lokr": {},
    "lokr-drawn": {"init_weights": False},
    "lokr-lycoris": {"init_weights": "lycoris"},
    "lokr-whole": {"r": 4, "decompose_factor": 2},
    "lokr-both": {"decompose_both": True, "decompose_factor": 4, "init_weights": False},
    "lokr-cores": {"use_effective_conv2d": True, "decompose_factor": 1},
    "lokr-cores-parted": {"use_effective_conv2d": True},
}
BEYOND = ("lokr", "lokr-whole", "lokr-both", "lokr-cores-parted")

CONTRACTS = [
    Contract(
        name,
        LoKrConfig,
        peft.LoKrConfig,
        {"r": 1, "alpha": 3, **options},
        # PEFT fails with cores where W₁ has more than one row
        CASES if name != "lokr-cores-parted" else (),
        (GROUPED, KERNELS) if name in BEYOND else (GROUPED,),
        trains_alike=False,
    )
    for name, options in OPTIONS.items()
]
