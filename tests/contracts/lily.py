"""Lily, whose layers share factors."""

import peft
from kinds import MATRIX, ROUNDED
from oracle import LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import LilyConfig

REFUSES = {
    "both ways": "its operations read it both as",
    "merge": "mixes its factors by what goes into a layer",
    "rows": "depends on all rows of its batch",
    "before dora": "reads weight with the changes so far",
}
OPTIONS = {"r": 3, "num_B": 2, "scaling": 0.7}
CASES = (LINEAR, WITHOUT_BIAS)

CONTRACTS = [
    Contract("lily", LilyConfig, peft.LilyConfig, OPTIONS, CASES, (TRANSPOSED, MATRIX, ROUNDED), refuses=REFUSES),
    Contract("lily-drawn", LilyConfig, peft.LilyConfig, OPTIONS | {"init_weights": False}, CASES[:1], refuses=REFUSES),
    Contract(
        "lily-shared",
        LilyConfig,
        peft.LilyConfig,
        OPTIONS | {"num_B": 3, "stride_A": 2},
        CASES[:1],
        refuses=REFUSES,
    ),
]
