"""The names of PEFT that this library doesn't have, each with the reason and what to use in its place."""

from __future__ import annotations

_TUNERS = (
    *("AdaLora", "Adamss", "AdaptionPrompt", "BOFT", "Beft", "C3A", "Deft", "Delora", "FourierFT", "Frod", "Glora"),
    *("Gralora", "HRA", "Hira", "IA3", "LNTuning", "Lily", "LoHa", "LoKr", "Lora", "Miss", "OFT", "OSF", "Peanut"),
    *("Poly", "Psoft", "Pvera", "RandLora", "Road", "Shadow", "Shira", "Supertuning", "TinyLora", "TrainableTokens"),
    *("UniLora", "VBLoRA", "Vera", "WaveFT", "XLora"),
)
"""The methods for which PEFT has a wrapper class."""

_TUNER = "a model isn't wrapped: get_peft_model(model, config) adapts it, and it stays of its own class"
_TOKENS = "graphs make them of the tensors in model.prompt_encoder; get_peft_model_state_dict(model) returns them"
_CACHES = "prefix tuning reads where a model keeps keys and values from its code, without a table of models"

ABSENT: dict[str, str] = {
    **{f"{method}Model": _TUNER for method in _TUNERS},
    **dict.fromkeys(("CPTEmbedding", "CartridgeEncoder", "PrefixEncoder", "PromptEmbedding", "PromptEncoder"), _TOKENS),
    "LoraRuntimeConfig": "an adapter is where its weight is, without ephemeral_gpu_offload, its only option",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": "a model takes adapters of any methods, without a class for it",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": _CACHES,
    "bloom_model_postprocess_past_key_value": _CACHES,
    "shift_tokens_right": "models of Transformers shift their labels themselves, prompts or not",
}
"""The names of ``peft.__all__``."""

_METHODS_OF_THE_MODEL = "the adapted model's method of this name does it"
_SIGNATURES = "an adapted model has the signatures of its own class"

ABSENT_MEMBERS: dict[str, dict[str, str]] = {
    "PeftModel": {
        "generate": "models that generate have their own, which takes adapter_names, too",
        "get_prompt": _TOKENS,
        "get_prompt_embedding_to_save": _TOKENS,
    },
    "layers": {
        "base_layer, get_base_layer": "there is no layer around a layer: model.fc is the layer itself, and "
        "model.fc.weight its weight",
        "lora_A, lora_B, lora_embedding_A, lora_embedding_B": "an adapter's tensors have its name before theirs: "
        "model.fc.default.lora_A and model.fc.default.lora_B",
        "merged, merged_adapters": "the model tells which adapters are merged: model.merged_adapters",
        "scaling": "it is a number beside the tensors: model.fc.default.lora_scaling",
    },
    "PeftConfig": {
        "check_kwargs": "options are checked when the config is made",
        "push_to_hub": "an adapted model's push_to_hub uploads it with the tensors",
    },
    "helpers": {
        "DoraCaching": "each call computes DoRA's norm",
        "MontecloraTrainerMixin": "add monteclora_loss(model) to the loss in a compute_loss of your own",
        "disable_input_dtype_casting": "casts are nodes of a graph, which is the same in all calls",
        "update_forward_signature": _SIGNATURES,
        "update_generate_signature": _SIGNATURES,
        "update_signature": _SIGNATURES,
    },
    "functional": {
        "cast_adapter_dtype": "autocast_adapter_dtype=True, the default, does it",
        "delete_adapter": _METHODS_OF_THE_MODEL,
        "set_adapter": _METHODS_OF_THE_MODEL,
        "set_requires_grad": _METHODS_OF_THE_MODEL,
    },
    "utils.hotswap": {"check_hotswap_configs_compatible": "hotswap_adapter checks them"},
}
"""The names of members of PEFT's models, layers and configs, and of its submodules, by where they are."""


def absence(name: str) -> str:
    """Returns the text of an error for a name that the package lacks."""
    return f"graphpeft has no {name}" + (f", unlike PEFT: {ABSENT[name]}" if name in ABSENT else "")
