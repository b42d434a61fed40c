"""Measures the bytes that a computation keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def kept_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Returns the bytes on the CPU that `run` allocates and doesn't free, without its result.

    These are the tensors saved for backward, and any other memory that something still holds.
    """
    # acc_events avoids a warning of PyTorch 2.10; there is only one cycle
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = run()
    allocated = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    return allocated - result.untyped_storage().nbytes()
