"""Converts a caller's config, this library's or PEFT's, to this library's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.registry import options, registered
from graphpeft.wording import shown


class ConfigLike(Protocol):
    """A config of this library or of PEFT."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the config's keys with plain values."""
        ...


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """Returns the config that a dictionary describes.

    Args:
        config_dict: Options by name; `peft_type` among them names the method.

    Returns:
        The config.

    Raises:
        ValueError: If the method isn't known, or an option has an invalid value.

    Examples:
        >>> get_peft_config({"peft_type": "LORA", "r": 2}).r
        2
    """
    return PeftConfig.from_dict(config_dict)


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Returns whether a folder, or a repository on the Hub, has an adapter of a method that exists here.

    Args:
        model_name_or_path: The folder or the repository.

    Returns:
        Whether its config can be read.

    Examples:
        >>> LoraConfig().save_pretrained("adapter")
        >>> check_if_peft_model("adapter"), check_if_peft_model("elsewhere")
        (True, False)
    """
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (FileNotFoundError, CheckpointError):
        return False
    return True


def as_config(given: ConfigLike) -> PeftConfig:
    """Returns a config of this library; a PEFT config is converted by its keys."""
    if type(given) is PeftConfig:
        return PeftConfig.from_dict(given.to_dict())
    if isinstance(given, PeftConfig):
        return given
    if isinstance(given, type) or not (hasattr(given, "to_dict") and hasattr(given, "peft_type")):
        raise TypeError(f"config is {_no_config(given)}")
    # PEFT keeps runtime_config beside its keys and doesn't write it to files
    runtime = getattr(given, "runtime_config", None)
    if runtime is not None and runtime.ephemeral_gpu_offload:
        raise ValueError(
            "ephemeral_gpu_offload=True isn't supported: an adapter is where its weight is; leave runtime_config out"
        )
    values = given.to_dict()
    known = {field.name for c in registered().values() for field in options(c)} | {"peft_type"}
    return PeftConfig.from_dict({key: value for key, value in values.items() if key in known})


def _no_config(given: object) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}; pass an instance of a config class, such as LoraConfig(…)"
    if isinstance(given, Mapping):
        made = "PeftConfig.from_dict(…)" if "peft_type" in given else "LoraConfig(**…)"
        return (
            f"a {type(given).__name__}; pass the config that {made} makes of it, or another one, such as LoraConfig(…)"
        )
    if isinstance(given, str | os.PathLike):
        return (
            f"the {type(given).__name__} {shown(given)}; pass a config such as LoraConfig(…), or the one in a folder, "
            "PeftConfig.from_pretrained(folder). PeftModel.from_pretrained(model, folder) loads a saved adapter"
        )
    if isinstance(given, nn.Module):
        return f"a {type(given).__name__}; pass the model first and then a config, such as LoraConfig(…)"
    return f"a {type(given).__name__}; pass a graphpeft config such as LoraConfig(…)"
