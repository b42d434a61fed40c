"""When a pass leaves a computation as it was written: where something else derives code or gradients from it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from graphpeft._torch import is_transformed
from graphpeft.graph.scaled_sum import is_captured

HALVES = (torch.float16, torch.bfloat16)
"""The dtypes in which rounding once or twice makes a difference that can be seen."""


def wants_plain_form() -> bool:
    """Returns whether a compiler or an exporter reads the computation, or a transform other than the backward does.

    A compiler decides by itself what it makes in place, fuses, keeps and computes again. Transforms of ``torch.func``
    and forward-mode gradients have their own rules for each operation of PyTorch, and none for ours.
    """
    return is_captured() or is_transformed()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Lets a backward compute in the dtypes of its forward, whatever is around it."""
    is_on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_on else contextlib.nullcontext()
