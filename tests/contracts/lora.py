"""LoRA, and DoRA; the rest of LoRA's options have tests of their own."""

import peft
from oracle import CONV_1D, CONV_2D, EMBEDDING, MATRICES

from contracts.contract import Contract
from graphpeft import LoraConfig

CONTRACTS = [
    Contract("lora", LoraConfig, peft.LoraConfig, {"r": 2, "lora_alpha": 3}, (*MATRICES, CONV_1D, CONV_2D, EMBEDDING)),
    Contract("dora", LoraConfig, peft.LoraConfig, {"r": 2, "lora_alpha": 3, "use_dora": True}, (*MATRICES, CONV_2D)),
]
