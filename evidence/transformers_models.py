"""Small models of the architectures of Transformers, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from case import Case
from torch import nn

VOCABULARY = 99
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
HEADS = {"head_dim": 8, **GROUPED}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PAIR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8}
WAVES: dict[str, Any] = {
    "conv_dim": (16, 16, 16),
    "conv_stride": (4, 4, 4),
    "conv_kernel": (8, 4, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _text(batch: int, scale: float) -> dict[str, Any]:
    return {"input_ids": _ids(batch, int(8 * scale)), "use_cache": False}


def _encoded(batch: int, scale: float) -> dict[str, Any]:
    mask = torch.ones(batch, int(8 * scale), dtype=torch.long)
    mask[0, -3:] = 0
    return {"input_ids": _ids(batch, int(8 * scale)), "attention_mask": mask}


def _pair(batch: int, scale: float) -> dict[str, Any]:
    given = {"input_ids": _ids(batch, int(8 * scale)), "decoder_input_ids": _ids(batch, int(6 * scale))}
    return given | {"use_cache": False}


def _pictures(size: int) -> Callable[[int, float], dict[str, Any]]:
    return lambda batch, scale: {"pixel_values": torch.randn(batch, 3, int(size * scale), int(size * scale))}


_pixels = _pictures(32)


def _wave(batch: int, scale: float) -> dict[str, Any]:
    return {"input_values": torch.randn(batch, int(1600 * scale))}


def _both(batch: int, scale: float) -> dict[str, Any]:
    return _pixels(batch, 1) | {"input_ids": _ids(batch, int(8 * scale)).clamp(min=3)}


def _mel(batch: int, scale: float) -> dict[str, Any]:
    return {
        "input_features": torch.randn(batch, 8, 40),
        "decoder_input_ids": _ids(batch, int(6 * scale)),
        "use_cache": False,
    }


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


DECODERS: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": HEADS,
    "Gemma": HEADS,
    "Gemma2": HEADS,
    "Gemma3": {"text": True, **HEADS},
    "Phi": {},
    "Phi3": GROUPED,
    "GPT2": {},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]},
    "GPTNeoX": {},
    "GPTJ": {"rotary_dim": 4},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {},
    "Falcon": {},
    "Mixtral": {**GROUPED, **EXPERTS},
    "Qwen2Moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {**HEADS, **EXPERTS},
    "Cohere": GROUPED,
    "Cohere2": GROUPED,
    "Olmo": GROUPED,
    "Olmo2": GROUPED,
    "Olmo3": GROUPED,
    "Olmoe": {**GROUPED, **EXPERTS},
    "Glm": HEADS,
    "Glm4": HEADS,
    "Granite": GROUPED,
    "GraniteMoe": {**GROUPED, **EXPERTS},
    "StableLm": GROUPED,
    "CodeGen": {"rotary_dim": 4},
    "Starcoder2": GROUPED,
    "GPTBigCode": {},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "Persimmon": {},
    "XGLM": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "Biogpt": {"name": "BioGpt"},
    "Nemotron": GROUPED,
    "Helium": HEADS,
    "SmolLM3": GROUPED,
    "Ernie4_5": HEADS,
    "Exaone4": HEADS,
    "Seed": {"name": "SeedOss", **HEADS},
    "Arcee": HEADS,
    "GptOss": {**HEADS, **EXPERTS},
    "DeepseekV3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        **EXPERTS,
    },
    "Dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "Mamba": {"state_size": 4},
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1},
    "FalconMamba": {"state_size": 4},
    "RecurrentGemma": {
        **HEADS,
        "lru_width": 32,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 16,
    },
    "Jamba": {**GROUPED, **EXPERTS, "use_mamba_kernels": False},
    "Bamba": {**GROUPED, "mamba_n_heads": 8, "mamba_d_state": 4, "attn_layer_indices": [1]},
    "Rwkv": {},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "DebertaV2": {
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "max_relative_positions": 16,
    },
    "Deberta": {},
    "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "ModernBert": {},
    "Electra": {"embedding_size": 32},
    "Albert": {"embedding_size": 16},
    "MPNet": {},
    "SqueezeBert": {
        "embedding_size": 32,
        "q_groups": 1,
        "k_groups": 1,
        "v_groups": 1,
        "post_attention_groups": 1,
        "intermediate_groups": 1,
        "output_groups": 1,
    },
    "FNet": {},
    "XLMRoberta": {},
    "Camembert": {},
    "Ernie": {},
    "MobileBert": {"intra_bottleneck_size": 16, "true_hidden_size": 16, "embedding_size": 16},
    "RoFormer": {"embedding_size": 32},
    "Nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8},
    "Funnel": {
        "without": "num_hidden_layers",
        "d_model": 32,
        "n_head": 4,
        "d_head": 8,
        "d_inner": 48,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
    },
    "Longformer": {"attention_window": 4},
    "BigBird": {"attention_type": "original_full"},
    "LayoutLM": {},
    "Convbert": {"name": "ConvBert", "embedding_size": 32, "conv_kernel_size": 3},
    "MegatronBert": {},
    "XLNet": {"without": "max_position_embeddings", "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "NomicBert": {},
    "EuroBert": GROUPED,
}
PAIRS: dict[str, dict[str, Any]] = {
    "T5": T5,
    "MT5": T5,
    "UMT5": T5,
    "SwitchTransformers": {**T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "LongT5": {**T5, "local_radius": 4},
    "Bart": PAIR,
    "MBart": PAIR,
    "Pegasus": PAIR,
    "M2M100": PAIR,
    "Marian": PAIR,
    "Blenderbot": PAIR,
    "LED": {**PAIR, "attention_window": 4},
    "ProphetNet": {
        "without": "num_hidden_layers",
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
    "NllbMoe": {**PAIR, "num_experts": 2},
    "PLBart": PAIR,
}
VISIONS: dict[str, dict[str, Any]] = {
    "ViT": VISION,
    "DeiT": VISION,
    "Beit": VISION,
    "Dinov2": VISION,
    "Dinov2WithRegisters": {**VISION, "num_register_tokens": 2},
    "DINOv3ViT": {**VISION, "name": "DINOv3ViT"},
    "ViTMAE": {**VISION, "mask_ratio": 0.0},
    "ViTMSN": VISION,
    "Data2VecVision": VISION,
    "IJepa": VISION,
    "Swin": {
        "without": "num_attention_heads",
        **VISION,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "Swinv2": {
        "without": "num_attention_heads",
        **VISION,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "Segformer": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]},
    "PoolFormer": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "ConvNextV2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "Pvt": {
        "image_size": 32,
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
    },
    "MobileViT": {"image_size": 32, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 40]},
    "LevIT": {
        "name": "Levit",
        "image_size": 32,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
}
WAVE_MODELS: dict[str, dict[str, Any]] = {
    "Wav2Vec2": WAVES,
    "Hubert": WAVES,
    "WavLM": WAVES,
    "UniSpeech": WAVES,
    "SEW": {**WAVES, "squeeze_factor": 2},
}


def cases() -> Iterator[Case]:
    """Yields a model of each architecture that the installed Transformers has."""
    for name, more in DECODERS.items():
        suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        yield from _case(name, suffix, more, _text)
    for name, more in ENCODERS.items():
        yield from _case(name, "Model", more, _unmasked if name == "FNet" else _encoded)
    for name, more in PAIRS.items():
        yield from _case(name, "ForConditionalGeneration", more, _pair)
    for name, more in VISIONS.items():
        yield from _case(name, "Model", more, _pictures(64) if name in ("Segformer", "PoolFormer") else _pixels)
    for name, more in WAVE_MODELS.items():
        yield from _case(name, "Model", more, _wave)
    yield from _case(
        "Whisper",
        "ForConditionalGeneration",
        {**PAIR, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32},
        _mel,
    )
    towers = {"text_config": {**SIZES, "eos_token_id": 98}, "vision_config": {**SIZES, **VISION}, "projection_dim": 16}
    yield from _case("CLIP", "Model", towers, _both)
    yield from _case("Siglip", "Model", {k: v for k, v in towers.items() if k != "projection_dim"}, _both)


def _unmasked(batch: int, scale: float) -> dict[str, Any]:
    return {"input_ids": _ids(batch, int(8 * scale))}


def _case(name: str, suffix: str, more: dict[str, Any], inputs: Callable[[int, float], Any]) -> Iterator[Case]:
    more = dict(more)
    stem = more.pop("name", name)
    is_text, without = more.pop("text", False), more.pop("without", "")
    config_class = getattr(transformers, f"{stem}TextConfig" if is_text else f"{stem}Config", None)
    model_class = next(
        (getattr(transformers, f"{stem}{end}") for end in (suffix, "MTModel") if hasattr(transformers, f"{stem}{end}")),
        None,
    )
    if config_class is None or model_class is None:
        return

    def build() -> nn.Module:
        sizes = {name: size for name, size in SIZES.items() if name != without}
        return model_class(config_class(**sizes | more))

    yield Case("transformers", stem, build, inputs)
