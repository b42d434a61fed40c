"""GLoRA, with each kind of tensors."""

import peft
from oracle import BEYOND, CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import GloraConfig

CASES = (LINEAR, WITHOUT_BIAS)
OPTIONS = {
    "glora": {},
    "glora-drawn": {"init_weights": False, "bias": "glora_only"},
    "glora-vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    "glora-numbers": {"config_A_B": "constant", "config_C": "none", "config_D_E": "constant", "init_weights": False},
    "glora-weight": {"config_C": "none", "config_D_E": "none"},
    "glora-bias": {"config_A_B": "none", "config_D_E": "none"},
}

CONTRACTS = [
    Contract(
        name,
        GloraConfig,
        peft.GloraConfig,
        {"r": 2, **options},
        CASES[:1] if name == "glora-bias" else CASES,
        beyond=(*BEYOND, TRANSPOSED, CONV_2D) if name in ("glora", "glora-vectors") else (),
    )
    for name, options in OPTIONS.items()
]
