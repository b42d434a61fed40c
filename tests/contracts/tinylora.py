"""TinyLoRA, with a vector for each layer and with one for several, and its projections in files or not."""

import peft
from matrix_uses import ATTENTION, LAYERS, USES
from oracle import EMBEDDING, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import TinyLoraConfig

OPTIONS = {"r": 3, "u": 5, "init_weights": "uniform", "init_v_bound": 0.7}
DROPS = {"tinylora_dropout": 0.4}

CONTRACTS = [
    Contract(
        "tinylora",
        TinyLoraConfig,
        peft.TinyLoraConfig,
        {"u": 5},
        (LINEAR, WITHOUT_BIAS, TRANSPOSED, LAYERS, EMBEDDING),
        beyond=(USES, ATTENTION),
    ),
    Contract(
        "tinylora-drawn", TinyLoraConfig, peft.TinyLoraConfig, OPTIONS | {"bias": "tinylora_only"}, (LAYERS, EMBEDDING)
    ),
    Contract("tinylora-tied", TinyLoraConfig, peft.TinyLoraConfig, OPTIONS | {"weight_tying": 0.5}, (LAYERS,)),
    Contract("tinylora-one", TinyLoraConfig, peft.TinyLoraConfig, OPTIONS | {"weight_tying": 1.0}, (LAYERS,)),
    Contract("tinylora-unsaved", TinyLoraConfig, peft.TinyLoraConfig, OPTIONS | {"save_projection": False}, (LAYERS,)),
    Contract("tinylora-dropout", TinyLoraConfig, peft.TinyLoraConfig, OPTIONS | DROPS, (LAYERS, EMBEDDING)),
]
