"""LoRA: adds a low-rank product to a weight.

    y = x Wᵀ + b + (α / r) · dropout(x) Aᵀ Bᵀ        A of shape (r, in), B of shape (out, r)

with α/√r instead of α/r for rank-stabilised LoRA. Each kind of operation has a file with its rule. Sources: Hu et al.,
"LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; Kalajdzievski, "A Rank Stabilization Scaling
Factor for Fine-Tuning with LoRA", arXiv 2312.03732; the same numbers as PEFT's ``tuners/lora/layer.py``.
"""

from graphpeft.methods.lora.config import LoraConfig
from graphpeft.methods.lora.init.corda import CordaConfig, preprocess_corda
from graphpeft.methods.lora.init.eva import get_eva_state_dict, initialize_lora_eva_weights
from graphpeft.methods.lora.init.eva_directions import EvaConfig
from graphpeft.methods.lora.init.from_weight import LoftQConfig
from graphpeft.methods.lora.init.lora_ga import LoraGAConfig, preprocess_loraga
from graphpeft.methods.lora.init.replacing import replace_lora_weights_loftq
from graphpeft.methods.lora.per_call import LoraPerCallConfig
from graphpeft.methods.lora.variants.arrow import ArrowConfig
from graphpeft.methods.lora.variants.arrow_model import create_arrow_model
from graphpeft.methods.lora.variants.blocks import BdLoraConfig
from graphpeft.methods.lora.variants.kasa import KasaConfig, kasa_loss
from graphpeft.methods.lora.variants.monteclora import MontecloraConfig
from graphpeft.methods.lora.variants.monteclora_loss import monteclora_loss
from graphpeft.methods.lora.variants.velora import VeloraConfig

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraPerCallConfig",
    "MontecloraConfig",
    "VeloraConfig",
    "create_arrow_model",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "kasa_loss",
    "monteclora_loss",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
]
