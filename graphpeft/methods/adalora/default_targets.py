"""The weights that AdaLoRA adapts in a model of a known type, where the config names none, as in PEFT."""

from __future__ import annotations

_SEQUENCE_TO_SEQUENCE = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_QUERY_AND_VALUE = dict.fromkeys(
    ("gptj", "gpt_neo", "llama", "llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("q_proj", "v_proj")
)

DEFAULT_TARGET_MODULES: dict[str, tuple[str, ...] | str] = {
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "bart": _SEQUENCE_TO_SEQUENCE,
    "opt": _SEQUENCE_TO_SEQUENCE,
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "bloom": ("query_key_value",),
    "gpt_neox": ("query_key_value",),
    **_QUERY_AND_VALUE,
    "bert": ("query", "value"),
    "roberta": ("query", "key", "value", "dense"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    "deberta": ("in_proj",),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""AdaLoRA's `target_modules` by `model_type`; a string is a regular expression."""
