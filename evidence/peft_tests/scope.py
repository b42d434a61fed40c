"""The parts into which PEFT's tests fall, by the configs that they make.

A config is noted by the name of its class, and by `option=` for each option of a variant of LoRA.
"""

from __future__ import annotations

from typing import Any

LORA_AND_PROMPTS, OTHERS = PARTS = ("LoRA and the prompt methods", "all other methods, and the variants of LoRA")

_LORA_AND_PROMPTS = {
    "CPTConfig",
    "LoraConfig",
    "MultitaskPromptTuningConfig",
    "PeftConfig",
    "PeftConfigMixin",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
}

# Options that choose a variant of LoRA, and their classes.
VARIANTS = {
    "alora_invocation_tokens": "",
    "arrow_config": "ArrowConfig",
    "kasa_config": "KasaConfig",
    "monteclora_config": "MontecloraConfig",
    "use_bdlora": "BdLoraConfig",
    "velora_config": "VeloraConfig",
}

# Words of tests of such a variant's own functions, and of tests whose configs were made when their file was imported.
_OF_OTHERS = ("_alora", "activatedlora", "bdlora", "kasa", "monteclora", "velora", "_adalora", "_loha", "_lokr")


def words(cls: type, given: dict[str, Any]) -> set[str]:
    """Returns the words by which a config is noted; none for other classes."""
    if cls.__name__ in VARIANTS.values() or any(base.__name__ == "PeftConfigMixin" for base in cls.__mro__):
        return {cls.__name__, *options(given)}
    return set()


def options(given: dict[Any, Any]) -> set[str]:
    """Returns the words of the options that choose a variant of LoRA."""
    return {f"{name}=" for name in VARIANTS if given.get(name)}


def part(test: str, noted: set[str]) -> str:
    """Returns the part of a test that makes such configs."""
    is_of_others = any(word in test.lower() for word in _OF_OTHERS)
    return LORA_AND_PROMPTS if noted <= _LORA_AND_PROMPTS and not is_of_others else OTHERS
