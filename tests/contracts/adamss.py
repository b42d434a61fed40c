"""AdaMSS, with groups of one rank and of several, beside a bias and without."""

import peft
from matrix_uses import LAYERS
from oracle import CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import AdamssConfig

OPTIONS = {
    "adamss-drawn": {"init_weights": None, "r": 3, "random_seed": 4},
    "adamss-ranks": {"subspace_rank": 2, "num_subspaces": 2, "init_weights": None},
    "adamss-dynamic": {"use_dynamic_rank": True, "svd_threshold": 0.3, "subspace_rank": 2, "num_subspaces": 2},
}

CONTRACTS = [
    Contract(
        "adamss",
        AdamssConfig,
        peft.AdamssConfig,
        {"num_subspaces": 3},
        (LINEAR, WITHOUT_BIAS, LAYERS),
        beyond=(TRANSPOSED, CONV_2D),
    ),
    *(Contract(name, AdamssConfig, peft.AdamssConfig, options, (LAYERS,)) for name, options in OPTIONS.items()),
]
