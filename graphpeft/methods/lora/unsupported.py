"""Options of PEFT's LoRA that are supported with their default alone, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

from graphpeft.rules.plain_values import default_of
from graphpeft.wording import shown

_MEGATRON = "layers of Megatron, which are in parts on several devices, aren't adapted"
_QALORA = "PEFT has it for layers of GPTQ, which aren't adapted, and ignores it at all others"

REASONS = {
    "megatron_config": _MEGATRON,
    "megatron_core": _MEGATRON,
    "qalora_group_size": _QALORA,
    "use_qalora": _QALORA,
}
"""The options, each with the reason."""


def check(config: Any) -> None:
    """Raises ValueError for another value than the default."""
    defaults = {field.name: default_of(field) for field in dataclasses.fields(config) if field.name in REASONS}
    for name, reason in REASONS.items():
        value = getattr(config, name)
        if value and value != defaults[name]:
            raise ValueError(f"{name}={shown(value)} is not supported; leave it {defaults[name]!r}: {reason}")
