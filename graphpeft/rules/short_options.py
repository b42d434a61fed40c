"""A config's options in a few words, for pictures and prints."""

from __future__ import annotations

from typing import Any

from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import Role, options_for
from graphpeft.rules.plain_values import default_of, fields_of, plain
from graphpeft.wording import shortened, shown

_SIZES = {"r": "r", "lora_alpha": "α", "alpha": "α"}
"""Options that are told even if they have their defaults, with their letters."""

_NAMES = frozenset({"target_modules", "target_parameters", "exclude_modules", "task_type"})
"""Options that say at which names an adapter is, which shows in other ways."""


def short_options(config: PeftConfig) -> str:
    """Returns those options of a config that say how its adapter computes, as text."""
    # those of all methods say for which model it is
    not_told = _NAMES.union(options_for(PeftConfig, Role.EDITABLE))
    told: dict[str, str] = {}
    for field in fields_of(type(config)):
        given = getattr(config, field.name)
        if given is field.default and field.name not in _SIZES:
            continue
        value: Any = plain(given)
        if field.name in _SIZES and value is not None:
            told[_SIZES[field.name]] = shown(value)
        elif field.name not in not_told and value != plain(default_of(field)):
            told[field.name] = shortened(shown(value), 60)
    return ", ".join(f"{name}={value}" for name, value in told.items())
