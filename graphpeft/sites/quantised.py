"""Quantised weights: tensors that hold codes of numbers, to which no change can be added.

A quantised weight holds integers, or its tensor subclass decodes it. The subclass may report any dtype: torchao's
tensors report single precision, and bitsandbytes' may be packed in half precision.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
_BACKENDS = {"Params4bit": "bnb 4bit", "Int8Params": "bnb 8bit"}
"""PEFT's names of backends, by the classes of their weights; others have the name of their package, in PEFT, too."""

_OF_PYTORCH = ("torch.distributed.", "torch._subclasses.", "torch.nn.")
"""Packages of PyTorch's own tensor subclasses: distributed or fake tensors, which add like other tensors."""


def is_quantised(weight: torch.Tensor) -> bool:
    """Returns whether the elements of a weight are codes of numbers."""
    dtype = weight.dtype
    return not (dtype.is_floating_point or dtype.is_complex) or _overrides_computation(type(weight))


def described(weight: torch.Tensor) -> str:
    """Returns the dtype of a quantised weight, or the name of its tensor subclass, as text."""
    return str(weight.dtype) if type(weight) in _PLAIN else f"{type(weight).__name__}"


def backend_of(weight: torch.Tensor) -> str | None:
    """Returns PEFT's name for what has quantised a weight, the package for others, or None for plain numbers."""
    if not is_quantised(weight):
        return None
    package = type(weight).__module__.partition(".")[0]
    return _BACKENDS.get(type(weight).__name__, package)


def way_of_computing(weight: torch.Tensor) -> str:
    """Returns a key for how a weight computes: its description, and its subclass's metadata beside inner tensors."""
    # torchao has one class for quantised weights with and without quantised inputs
    flatten = getattr(weight, "__tensor_flatten__", None)
    return described(weight) if flatten is None else f"{described(weight)} {flatten()[1]}"


@functools.cache
def _overrides_computation(cls: type[torch.Tensor]) -> bool:
    """Returns whether a tensor subclass overrides how PyTorch computes with its tensors."""
    own: list[Any] = [base for base in cls.__mro__[: cls.__mro__.index(torch.Tensor)] if base not in _PLAIN]
    return any(
        name in vars(base) and not base.__module__.startswith(_OF_PYTORCH)
        for base in own
        for name in ("__torch_function__", "__torch_dispatch__")
    )
