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

# Variants of LoRA that graphpeft doesn't have yet; docs/lora.md says so.
REFUSED = {
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "velora_config",
}


def words(cls: type, given: dict[str, Any]) -> set[str]:
    """Returns the words by which a config is noted; none for other classes."""
    if not any(base.__name__ == "PeftConfigMixin" for base in cls.__mro__):
        return set()
    return {cls.__name__, *options(given)}


def options(given: dict[Any, Any]) -> set[str]:
    """Returns the words of the options that choose a refused variant."""
    return {f"{name}=" for name in REFUSED if given.get(name)}


def covers(noted: set[str]) -> bool:
    """Returns whether a test that makes such configs is in scope."""
    return noted <= METHODS
