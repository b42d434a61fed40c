"""AdaLoRA at its start: on matrices, and on kernels of two dimensions."""

import peft
from kinds import ATTENTION, MATRIX, ROUNDED, STACK
from oracle import CONV_1D, CONV_2D, GROUPED, MATRICES, POINTWISE

from contracts.contract import Contract
from graphpeft import AdaLoraConfig

OPTIONS = {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 20, "tinit": 8}
CASES = (*MATRICES, CONV_2D, POINTWISE)
# without a task, PEFT adds no penalty to the loss
IN_LLAMA = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}

CONTRACTS = [
    Contract(
        "adalora",
        AdaLoraConfig,
        peft.AdaLoraConfig,
        OPTIONS,
        CASES,
        (CONV_1D, GROUPED, MATRIX, STACK, ATTENTION, ROUNDED),
        llama=IN_LLAMA,
        sized={"total_step": 1000},
        trained_by_mistake=".ranknum.",
    ),
    Contract("adalora-drawn", AdaLoraConfig, peft.AdaLoraConfig, OPTIONS | {"init_lora_weights": False}, CASES),
    Contract("adalora-dropout", AdaLoraConfig, peft.AdaLoraConfig, OPTIONS | {"lora_dropout": 0.4}, CASES),
    Contract("adalora-without-alpha", AdaLoraConfig, peft.AdaLoraConfig, OPTIONS | {"lora_alpha": 0}, CASES[:1]),
]
