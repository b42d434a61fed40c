"""Regions under ``torch.autocast`` in a graph: a node where each begins, and one where it ends.

A run that raises inside of a region, as a guard does, leaves none of its settings behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as leave_autocast

__all__ = ["closing_regions", "enter_autocast", "leave_autocast"]


def closing_regions(graph: fx.Graph, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the compiled `forward` of `graph` as one that ends its regions when it raises."""
    for device in sorted({str(node.args[0]) for node in graph.nodes if node.target is enter_autocast}):
        forward = _as_outside(device, forward)
    return forward


def _as_outside(device: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def close(*args: Any, **kwargs: Any) -> Any:
        # leaving a region of the same settings as outside puts these back, whatever was begun inside
        with torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)):
            return forward(*args, **kwargs)

    return close
