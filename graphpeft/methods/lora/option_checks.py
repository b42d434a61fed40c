"""Checks of LoRA's options: refusals of options without support, and of contradictions."""

from __future__ import annotations

from typing import Any

from graphpeft.methods.lora import merge_aware
from graphpeft.methods.lora.variants import kinds
from graphpeft.rules.plain_values import default_of
from graphpeft.wording import shown

_MEGATRON = "layers of Megatron, which are in parts on several devices, aren't adapted"
_QALORA = "PEFT has it for layers of GPTQ, which aren't adapted, and ignores it at all others"

_REASONS = {
    "megatron_config": _MEGATRON,
    "megatron_core": _MEGATRON,
    "qalora_group_size": _QALORA,
    "use_qalora": _QALORA,
}
"""The options that are supported with their default alone, each with the reason."""


def check_supported(config: Any) -> None:
    """Raises ValueError for options that aren't supported, and for one that lacks what it needs."""
    fields = type(config).__dataclass_fields__
    for name, reason in _REASONS.items():
        value = getattr(config, name)
        if value and value != (default := default_of(fields[name])):
            raise ValueError(f"{name}={shown(value)} is not supported; leave it {default!r}: {reason}")
    if config.init_lora_weights == "loftq" and not config.loftq_config:
        raise ValueError("init_lora_weights='loftq' needs loftq_config, such as {'loftq_bits': 4}")


def check_values(config: Any) -> None:
    """Raises ValueError for options that contradict each other."""
    merge_aware.check(config.merged_quantiser)
    kinds.check(config)
    if config.lora_bias and config.use_dora:
        raise ValueError("lora_bias=True isn't for DoRA, as in PEFT: leave use_dora or lora_bias out")
    if config.lora_bias and config.init_lora_weights not in (True, False):
        raise ValueError(
            f"lora_bias=True needs init_lora_weights True or False, as in PEFT, not {config.init_lora_weights!r}"
        )
    if config.use_dora and config.init_lora_weights == "mica":
        raise ValueError("init_lora_weights='mica' isn't for DoRA, as in PEFT: leave use_dora out")
