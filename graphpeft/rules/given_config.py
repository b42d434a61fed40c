"""Converts a caller's config, this library's or PEFT's, to this library's."""

from __future__ import annotations

from typing import Any, Protocol

from graphpeft.rules.config import PeftConfig
from graphpeft.rules.registry import options, registered


class ConfigLike(Protocol):
    """A config of this library or of PEFT."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the config's keys with plain values."""
        ...


def as_config(given: ConfigLike) -> PeftConfig:
    """Returns a config of this library; a PEFT config is converted by its keys.

    Raises:
        TypeError: If `given` is no config.
        ValueError: If the method, or the runtime config of PEFT, isn't supported.
    """
    if isinstance(given, PeftConfig):
        return given
    if not (hasattr(given, "to_dict") and hasattr(given, "peft_type")):
        raise TypeError(f"config is a {type(given).__name__}; pass a graphpeft config such as LoraConfig(…)")
    # PEFT keeps runtime_config beside its keys and doesn't write it to files
    runtime = getattr(given, "runtime_config", None)
    if runtime is not None and runtime.ephemeral_gpu_offload:
        raise ValueError(
            "ephemeral_gpu_offload=True isn't supported: an adapter is where its weight is; leave runtime_config out"
        )
    values = given.to_dict()
    known = {field.name for c in registered().values() for field in options(c)} | {"peft_type"}
    return PeftConfig.from_dict({key: value for key, value in values.items() if key in known})
