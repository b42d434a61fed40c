"""The precision of operations that don't choose it themselves: regions of autocast, and PyTorch's default dtype."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.amp.autocast_mode import is_autocast_available

T = TypeVar("T")

HALVES = (torch.float16, torch.bfloat16)
"""The dtypes in which rounding twice instead of once visibly changes results."""


def is_in_autocast(device: str) -> bool:
    """Returns whether operations on a kind of device are in a region of autocast; on the meta device none is."""
    return is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str, run: Callable[..., T], *args: Any) -> T:
    """Returns the result of a function whose operations on a kind of device no region of autocast changes."""
    if not is_in_autocast(device):
        return run(*args)
    with torch.autocast(device, enabled=False):
        return run(*args)


def depth_of_autocast() -> int:
    """Returns how many regions of autocast are around the caller, also of those that switch it off."""
    inside = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return inside - 1


def default_precision() -> torch.dtype:
    """Returns the dtype of tensors beside modules that have none to tell: the default one, and no half precision."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


@contextlib.contextmanager
def in_own_precision(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Computes what belongs to a model in the precision of its parameters, whatever region the caller is in.

    No region of autocast acts inside. The default dtype is single precision if it was half precision and the model has
    parameters of single or double precision, or none of half precision; other threads see that until the block ends.
    """
    if not depth_of_autocast() and torch.get_default_dtype() not in HALVES and not _SINGLE.count:
        yield
        return
    tensors = [parameter for module in modules.values() for parameter in module.parameters(recurse=False)]
    with contextlib.ExitStack() as stack:
        for kind in {tensor.device.type for tensor in tensors}:
            if is_in_autocast(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        dtypes = {tensor.dtype for tensor in tensors}
        if dtypes.isdisjoint(HALVES) or not dtypes.isdisjoint((torch.float32, torch.float64)):
            stack.enter_context(_SINGLE)
        yield


class _SinglePrecision:
    """A context in which the default dtype isn't one of half precision; threads share it, and the last one ends it."""

    def __init__(self) -> None:
        self.count, self._lock, self._before = 0, threading.Lock(), torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if not self.count:
                self._before = torch.get_default_dtype()
                if self._before in HALVES:
                    torch.set_default_dtype(torch.float32)
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.count -= 1
            if not self.count and self._before in HALVES:
                torch.set_default_dtype(self._before)


_SINGLE = _SinglePrecision()
