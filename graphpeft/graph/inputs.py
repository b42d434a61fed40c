"""Example inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ExampleInputs = tuple[Any, ...] | Mapping[str, Any]
"""Positional arguments as a tuple, or keyword arguments as a dict or another mapping, such as a `BatchEncoding`."""


def split_inputs(example_inputs: ExampleInputs | None) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
    """Splits example inputs into positional arguments (None without example inputs) and keyword arguments."""
    if example_inputs is None:
        return None, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    raise TypeError(
        f"example_inputs is a {type(example_inputs).__name__}; pass a tuple of positional arguments, such as (x,), or "
        "a dict of keyword arguments"
    )
