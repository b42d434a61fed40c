"""Checks of AdaLoRA's options: refusals of values, and warnings of LoRA's options that have no effect in it."""

from __future__ import annotations

import warnings
from typing import Any

from graphpeft.methods.lora.config import LoraConfig
from graphpeft.peft_errors import PeftWarning
from graphpeft.wording import joined, shown

_LORA = LoraConfig()


def warn_of_unused(config: Any) -> None:
    """Warns of options that have no effect."""
    for name in ("r", "use_rslora", "alpha_pattern", "lora_bias"):
        if getattr(config, name) != getattr(_LORA, name):
            _warn(f"{name}={shown(getattr(config, name))}", "leave it out" + "; the rank is init_r" * (name == "r"))
    if isinstance(config.init_lora_weights, str):
        _warn(f"init_lora_weights={config.init_lora_weights!r}", "it is as True")


def check_values(config: Any) -> None:
    """Raises ValueError for options that AdaLoRA doesn't have, and for a schedule without a step that drops ranks."""
    for name in ("use_dora", "loftq_config"):
        if getattr(config, name):
            raise ValueError(f"{name} isn't for AdaLoRA, as in PEFT; leave it out")
    if not config.total_step:
        raise ValueError("total_step must be the number of steps of the training, from which AdaLoRA has a budget")
    if config.tinit >= config.total_step - config.tfinal:
        raise ValueError(
            f"tinit={config.tinit} and tfinal={config.tfinal} leave none of the {config.total_step} steps of "
            "total_step in which ranks are dropped; decrease tinit or tfinal, or increase total_step"
        )
    wrong = [key for key, mask in (config.rank_pattern or {}).items() if len(mask) != config.init_r]
    if wrong:
        raise ValueError(f"rank_pattern says of {joined(wrong)} which of other numbers of ranks than init_r stay")


def _warn(what: str, way_out: str) -> None:
    warnings.warn(f"{what} has no effect in AdaLoRA, as in PEFT; {way_out}", PeftWarning, stacklevel=7)
