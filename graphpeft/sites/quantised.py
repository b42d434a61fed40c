"""Quantised weights: tensors that hold codes of numbers, to which no change can be added.

They hold integers, or a class of tensors of its own decodes them, whichever dtype it says that it has: torchao's are in
single precision for whoever asks, and those of bitsandbytes may lie packed in half precision.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
_OF_PYTORCH = ("torch.distributed.", "torch._subclasses.", "torch.nn.")
"""Where classes of tensors are at home that are spread over devices or have no data yet, and add as others do."""


def is_quantised(weight: torch.Tensor) -> bool:
    """Returns whether the elements of a weight are codes of numbers."""
    dtype = weight.dtype
    return not (dtype.is_floating_point or dtype.is_complex) or _computes_by_itself(type(weight))


def described(weight: torch.Tensor) -> str:
    """Returns what a quantised weight is, for a person to read."""
    return str(weight.dtype) if type(weight) in _PLAIN else f"{type(weight).__name__}"


def way_of_computing(weight: torch.Tensor) -> str:
    """Returns what it depends on how a weight computes: its class, and what that says of it beside its tensors."""
    # torchao has one class for layers whose inputs are quantised, too, and for those whose weight alone is
    flatten = getattr(weight, "__tensor_flatten__", None)
    return described(weight) if flatten is None else f"{described(weight)} {flatten()[1]}"


@functools.cache
def _computes_by_itself(cls: type[torch.Tensor]) -> bool:
    """Returns whether a class of tensors has a way of its own to compute with them."""
    own: list[Any] = [base for base in cls.__mro__[: cls.__mro__.index(torch.Tensor)] if base not in _PLAIN]
    return any(
        name in vars(base) and not base.__module__.startswith(_OF_PYTORCH)
        for base in own
        for name in ("__torch_function__", "__torch_dispatch__")
    )
