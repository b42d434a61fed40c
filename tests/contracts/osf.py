"""OSF, with its directions those of the weight and drawn, and with other numbers of them."""

import peft
from matrix_uses import ATTENTION, LAYERS, USES
from oracle import CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import OSFConfig

OPTIONS = {
    "osf-drawn": {"init_weights": False},
    "osf-one": {"effective_rank": 1},
    "osf-share": {"effective_rank": 0.8, "rank_pattern": {"[24]": 2}},
}

CONTRACTS = [
    Contract(
        "osf",
        OSFConfig,
        peft.OSFConfig,
        {},
        (LINEAR, WITHOUT_BIAS, LAYERS),
        beyond=(TRANSPOSED, CONV_2D, USES, ATTENTION),
    ),
    *(Contract(name, OSFConfig, peft.OSFConfig, options, (LAYERS,)) for name, options in OPTIONS.items()),
]
