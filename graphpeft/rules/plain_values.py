"""Converts values of options to JSON's types."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import Any

ATOMS = (bool, int, float, str)
"""The types of values that JSON has as they are."""


@functools.cache
def fields_of(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    """Returns the fields of a dataclass."""
    return dataclasses.fields(cls)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Returns the default of an option as a plain value."""
    return plain(field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default)


def plain(value: Any) -> Any:
    """Converts a value to JSON's types: an enum to its value, a set to a sorted list, a dataclass to a dict."""
    if value is None or type(value) in ATOMS:
        return value
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return value
