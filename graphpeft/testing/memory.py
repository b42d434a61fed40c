"""How many bytes a computation keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def kept_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Returns the bytes on the CPU that `run` allocates and that are still there behind it, beside its result.

    These are what its backward needs, and what the model itself holds on to. All memory is counted, whoever keeps it.

    Args:
        run: Computes something with gradients, such as a loss.
    """
    # acc_events: there is one cycle, which PyTorch 2.10 warns of otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = run()
    allocated = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    return allocated - result.untyped_storage().nbytes()
