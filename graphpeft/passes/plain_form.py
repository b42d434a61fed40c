"""Decides when optimised functions compute in their original form: under compilers, exporters and transforms."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from graphpeft._torch import is_transformed
from graphpeft.graph.scaled_sum import is_captured


def wants_plain_form() -> bool:
    """Returns whether a compiler, an exporter, a ``torch.func`` transform or forward-mode AD reads the computation.

    A compiler makes its own choices of in-place operations, fusion, saved tensors and recomputation. ``torch.func`` and
    forward-mode AD have rules for each operation of PyTorch, but none for the functions of passes.
    """
    return is_captured() or is_transformed()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Disables autocast inside the context, so that a backward computes in the dtypes of its forward."""
    is_on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_on else contextlib.nullcontext()
