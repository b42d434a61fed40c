"""Tensors in values of any structure: which there are, in double precision, and how far two lists of them are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def floats(value: Any) -> list[Tensor]:
    """Returns the tensors of real numbers in a value, in their order; complex ones as pairs of these."""
    found = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors_in(value)]
    return [tensor for tensor in found if tensor.is_floating_point()]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in a value, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) or isinstance(value, torch.distributions.Distribution):
        yield from tensors_in(vars(value))


def in_double(value: Any) -> Any:
    """Returns arguments whose tensors of real numbers have double precision."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: in_double(item) for name, item in value.items()}
    return type(value)(in_double(item) for item in value) if isinstance(value, list | tuple) else value


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Returns by how much tensors differ at most, in relation to the largest number of each."""
    if not found or [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return float("inf")
    return max(_distance(a, b) for a, b in zip(found, expected, strict=True))


def _distance(found: Tensor, expected: Tensor) -> float:
    differing = ~((found == expected) | (found.isnan() & expected.isnan()))
    if not differing.any():
        return 0.0
    scale = expected.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-12)
    return float((found - expected).abs()[differing].nan_to_num(nan=float("inf")).max() / scale)
