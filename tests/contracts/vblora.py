"""VB-LoRA, with whole logits in files."""

import peft
from kinds import ROUNDED
from matrix_uses import ATTENTION, LAYERS, USES
from oracle import LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import VBLoRAConfig

OPTIONS = {"r": 3, "num_vectors": 9, "vector_length": 2, "init_vector_bank_bound": 0.5}

CONTRACTS = [
    Contract(
        "vblora",
        VBLoRAConfig,
        peft.VBLoRAConfig,
        OPTIONS,
        (LINEAR, WITHOUT_BIAS, TRANSPOSED, LAYERS),
        beyond=(USES, ATTENTION, ROUNDED),
        sized={"vector_length": 16},
    ),
    Contract("vblora-one", VBLoRAConfig, peft.VBLoRAConfig, OPTIONS | {"topk": 1, "bias": "vblora_only"}, (LAYERS,)),
    Contract("vblora-dropout", VBLoRAConfig, peft.VBLoRAConfig, OPTIONS | {"vblora_dropout": 0.4}, (LAYERS,)),
]
