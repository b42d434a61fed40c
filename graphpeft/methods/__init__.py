"""The methods, one file each: a config and its rules. Importing this package registers them all."""

from graphpeft.methods.adalora import AdaLoraConfig
from graphpeft.methods.adamss import AdamssConfig
from graphpeft.methods.adaption_prompt import AdaptionPromptConfig
from graphpeft.methods.beft import BeftConfig
from graphpeft.methods.boft import BOFTConfig
from graphpeft.methods.c3a import C3AConfig
from graphpeft.methods.cartridge import CartridgeConfig, compose_cartridge_adapters
from graphpeft.methods.cpt import CPTConfig
from graphpeft.methods.deft import DeftConfig
from graphpeft.methods.delora import DeloraConfig
from graphpeft.methods.fourierft import FourierFTConfig
from graphpeft.methods.frod import FrodConfig
from graphpeft.methods.glora import GloraConfig
from graphpeft.methods.gralora import GraloraConfig
from graphpeft.methods.hira import HiraConfig
from graphpeft.methods.hra import HRAConfig
from graphpeft.methods.ia3 import IA3Config
from graphpeft.methods.lily import LilyConfig
from graphpeft.methods.ln_tuning import LNTuningConfig
from graphpeft.methods.loha import LoHaConfig
from graphpeft.methods.lokr import LoKrConfig
from graphpeft.methods.lora import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraPerCallConfig,
    MontecloraConfig,
    VeloraConfig,
    create_arrow_model,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    kasa_loss,
    monteclora_loss,
    preprocess_corda,
    preprocess_loraga,
    replace_lora_weights_loftq,
)
from graphpeft.methods.lora.conversion import convert_to_lora, save_as_lora
from graphpeft.methods.lora.deviation import conversion_deviation
from graphpeft.methods.lora.fine_tuned import extract_lora
from graphpeft.methods.lora.rescaling import rescale_adapter_scale
from graphpeft.methods.miss import MissConfig
from graphpeft.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from graphpeft.methods.oft import OFTConfig
from graphpeft.methods.osf import OSFConfig
from graphpeft.methods.peanut import PeanutConfig
from graphpeft.methods.poly import PolyConfig
from graphpeft.methods.prefix_tuning import PrefixTuningConfig
from graphpeft.methods.prompt_encoder import PromptEncoderConfig, PromptEncoderReparameterizationType
from graphpeft.methods.prompt_tuning import PromptTuningConfig, PromptTuningInit
from graphpeft.methods.prompts.cached_prefixes import (
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from graphpeft.methods.prompts.prompt_config import PromptLearningConfig
from graphpeft.methods.prompts.token_sequences import TokenSequence, find_token_sequence
from graphpeft.methods.psoft import PsoftConfig
from graphpeft.methods.pvera import PveraConfig
from graphpeft.methods.randlora import RandLoraConfig
from graphpeft.methods.road import RoadConfig
from graphpeft.methods.shadow import ShadowConfig
from graphpeft.methods.shira import ShiraConfig
from graphpeft.methods.supertuning import SupertuningConfig
from graphpeft.methods.tinylora import TinyLoraConfig
from graphpeft.methods.trainable_tokens import TrainableTokensConfig
from graphpeft.methods.unilora import UniLoraConfig
from graphpeft.methods.vblora import VBLoRAConfig
from graphpeft.methods.vera import VeraConfig
from graphpeft.methods.waveft import WaveFTConfig
from graphpeft.methods.weight_decomposed import WeightDecomposedConfig
from graphpeft.methods.xlora import XLoraConfig

__all__ = [
    "AdaLoraConfig",
    "AdamssConfig",
    "AdaptionPromptConfig",
    "ArrowConfig",
    "BOFTConfig",
    "BdLoraConfig",
    "BeftConfig",
    "C3AConfig",
    "CPTConfig",
    "CartridgeConfig",
    "CordaConfig",
    "DeftConfig",
    "DeloraConfig",
    "EvaConfig",
    "FourierFTConfig",
    "FrodConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "KasaConfig",
    "LNTuningConfig",
    "LilyConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraPerCallConfig",
    "MissConfig",
    "MontecloraConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "OFTConfig",
    "OSFConfig",
    "PeanutConfig",
    "PolyConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "PsoftConfig",
    "PveraConfig",
    "RandLoraConfig",
    "RoadConfig",
    "ShadowConfig",
    "ShiraConfig",
    "SupertuningConfig",
    "TinyLoraConfig",
    "TokenSequence",
    "TrainableTokensConfig",
    "UniLoraConfig",
    "VBLoRAConfig",
    "VeloraConfig",
    "VeraConfig",
    "WaveFTConfig",
    "WeightDecomposedConfig",
    "XLoraConfig",
    "compose_cartridge_adapters",
    "conversion_deviation",
    "convert_to_lora",
    "create_arrow_model",
    "extract_lora",
    "find_token_sequence",
    "get_eva_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "kasa_loss",
    "monteclora_loss",
    "preprocess_corda",
    "preprocess_loraga",
    "prompt_embeddings_from_past_key_values",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "save_as_lora",
]
