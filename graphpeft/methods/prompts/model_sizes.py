"""The sizes that the config of a Transformers model tells, under the names that its models have for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}
"""The names of sizes there, in the order in which PEFT looks for them, by the names of options here."""


def text_config_of(model: nn.Module) -> Any:
    """Returns the part of a Transformers model's config that is about its text; None without a config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def sizes_in(config: Any, options: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Returns the sizes in a model's config, by the names of this library's options."""
    found = {name: [getattr(config, option, None) for option in others] for name, others in options.items()}
    return {name: [size for size in sizes if isinstance(size, int)] for name, sizes in found.items()}
