"""The models that PEFT's tests load by name, as classes of Transformers with small sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Of a decoder, as LLaMA's. It has no padding token, whose row would be zeros: tests feed token 1 alone.
_LLAMA = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_OPT = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 4,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_BERT = {
    "vocab_size": 1124,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GPT2 = {"vocab_size": 1000, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
_T5 = {
    "vocab_size": 1103,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 5,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_BART = {
    "vocab_size": 1024,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_EXPERTS = {**_LLAMA, "hidden_size": 32, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN3_MOE = {
    **_LLAMA,
    "hidden_size": 32,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_GEMMA3 = {**_LLAMA, "hidden_size": 32, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 64}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


@dataclass(frozen=True)
class Model:
    """A model on the tiny hub.

    Attributes:
        cls: The name of its class.
        config: The name of its config's class.
        sizes: The options of the config.
        beside: The kind of the file that is saved beside the model, such as ``"tokenizer"``.
    """

    cls: str
    config: str
    sizes: dict[str, Any] = field(default_factory=dict)
    beside: str = "tokenizer"


def _llama(cls: str = "LlamaForCausalLM", **sizes: Any) -> Model:
    return Model(cls, "LlamaConfig", {**_LLAMA, **sizes})


def _opt(**sizes: Any) -> Model:
    return Model("OPTForCausalLM", "OPTConfig", {**_OPT, **sizes})


def _bert(cls: str, config: str, **sizes: Any) -> Model:
    return Model(cls, config, {**_BERT, **sizes})


MODELS: dict[str, Model] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt(),
    "peft-internal-testing/opt-125m": _opt(
        hidden_size=64, word_embed_proj_dim=64, ffn_dim=256, num_hidden_layers=12, vocab_size=50272
    ),
    "hf-internal-testing/tiny-random-OPTForCausalLM": _opt(),
    "facebook/opt-125m": _opt(hidden_size=64, word_embed_proj_dim=64, ffn_dim=256, num_hidden_layers=12),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _llama(),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _llama(),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _llama(),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": _llama("LlamaForSequenceClassification"),
    "gpt2": Model("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": Model("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "peft-internal-testing/tiny-random-gpt2": Model("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "hf-internal-testing/tiny-random-gpt2": Model("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": Model(
        "GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": Model(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**_BERT, "intermediate_size": 64}
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": Model(
        "BloomForCausalLM", "BloomConfig", {"vocab_size": 1024, "hidden_size": 32, "n_layer": 5, "n_head": 4}
    ),
    "peft-internal-testing/tiny-dummy-qwen2": Model("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, "hidden_size": 32}),
    "Qwen/Qwen2-0.5B": Model("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": Model("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": Model("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _QWEN3_MOE),
    "hf-internal-testing/tiny-qwen3-moe": Model("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _QWEN3_MOE),
    "hf-internal-testing/tiny-random-MistralForCausalLM": Model(
        "MistralForCausalLM", "MistralConfig", {**_LLAMA, "hidden_size": 32, "num_key_value_heads": 2}
    ),
    "hf-internal-testing/Mixtral-tiny": Model("MixtralForCausalLM", "MixtralConfig", _EXPERTS),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Model("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA3),
    "peft-internal-testing/tiny-random-gemma4-E2B": Model(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **_GEMMA3,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 1024,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": Model(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_EXPERTS, "head_dim": 8, "intermediate_size_mlp": 64, "num_experts_per_tok": 1},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": Model(
        "GptOssForCausalLM", "GptOssConfig", {**_EXPERTS, "hidden_size": 8, "head_dim": 2, "intermediate_size": 32}
    ),
    "peft-internal-testing/tiny-random-BertModel": _bert("BertModel", "BertConfig"),
    "hf-internal-testing/tiny-random-BertModel": _bert("BertModel", "BertConfig"),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": _bert(
        "BertForSequenceClassification", "BertConfig"
    ),
    "peft-internal-testing/tiny-random-RobertaModel": _bert("RobertaModel", "RobertaConfig"),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": _bert(
        "RobertaForSequenceClassification", "RobertaConfig"
    ),
    "peft-internal-testing/tiny-random-DebertaModel": _bert(
        "DebertaModel", "DebertaConfig", pos_att_type=["c2p", "p2c"], relative_attention=True
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": _bert("DebertaV2Model", "DebertaV2Config"),
    "peft-internal-testing/tiny-random-t5": Model("T5ForConditionalGeneration", "T5Config", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": Model(
        "T5ForConditionalGeneration", "T5Config", _T5
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": Model(
        "T5ForConditionalGeneration", "T5Config", _T5
    ),
    "google/flan-t5-small": Model(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": Model(
        "BartForConditionalGeneration", "BartConfig", _BART
    ),
    "peft-internal-testing/tiny-WhisperForConditionalGeneration": Model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_BART,
            "num_mel_bins": 80,
            "decoder_start_token_id": 0,
            "max_source_positions": 30,
            "max_target_positions": 40,
        },
    ),
    "peft-internal-testing/tiny-clip-text-2": Model(
        "CLIPTextModel",
        "CLIPTextConfig",
        {
            "vocab_size": 1000,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "max_position_embeddings": 77,
        },
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": Model(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3},
        "image processor",
    ),
    "hf-internal-testing/tiny-random-ViTModel": Model("ViTModel", "ViTConfig", _VISION, "image processor"),
    "peft-internal-testing/tiny-LlavaForConditionalGeneration": Model(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **_VISION},
            "text_config": {"model_type": "llama", **_LLAMA},
            "image_token_index": 5,
        },
        "llava processor",
    ),
}

# Revisions that tests ask for, beside the main one.
OTHER_REVISIONS = {"peft-internal-testing/tiny-opt-lora-revision": ("test",)}

# Adapters that tests load: the base, the task (none for Whisper), and the folder inside.
ADAPTERS: dict[str, tuple[str, str | None, str]] = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "CAUSAL_LM",
        "",
    ),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "SEQ_CLS",
        "",
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "QUESTION_ANS",
        "",
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "FEATURE_EXTRACTION",
        "",
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        "peft-internal-testing/tiny-random-GPT2LMHeadModel",
        "TOKEN_CLS",
        "",
    ),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": ("peft-internal-testing/tiny-random-t5", "SEQ_2_SEQ_LM", ""),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": (
        "peft-internal-testing/tiny-WhisperForConditionalGeneration",
        None,
        "",
    ),
    "peft-internal-testing/tiny-random-BertModel-lora": (
        "peft-internal-testing/tiny-random-BertModel",
        "FEATURE_EXTRACTION",
        "",
    ),
    "peft-internal-testing/tiny-opt-lora-revision": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "CAUSAL_LM",
        "",
    ),
    "peft-internal-testing/gpt2-lora-random": ("peft-internal-testing/tiny-random-gpt2", "CAUSAL_LM", ""),
    "peft-internal-testing/test-lora-subfolder": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "CAUSAL_LM",
        "test",
    ),
}
