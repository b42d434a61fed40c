"""Which of PEFT's tests are about what graphpeft has, by the configs that they make.

A config is noted by the name of its class, and by `option=` for each option of a LoRA variant that graphpeft refuses by
plan.
"""

from __future__ import annotations

from typing import Any

METHODS = {
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

# Options that choose a variant of LoRA which graphpeft doesn't have yet, as docs/lora.md says, and their classes.
REFUSED = {
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
    if cls.__name__ in REFUSED.values() or any(base.__name__ == "PeftConfigMixin" for base in cls.__mro__):
        return {cls.__name__, *options(given)}
    return set()


def options(given: dict[Any, Any]) -> set[str]:
    """Returns the words of the options that choose a refused variant."""
    return {f"{name}=" for name in REFUSED if given.get(name)}


def covers(test: str, noted: set[str]) -> bool:
    """Returns whether a test that makes such configs is in scope."""
    return noted <= METHODS and not any(word in test.lower() for word in _OF_OTHERS)
