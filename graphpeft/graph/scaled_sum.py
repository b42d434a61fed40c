"""Adds a change that has a factor: y + s · change.

``torch.add(y, change, alpha=s)`` does that in one step. But the default backend of ``torch.compile`` in PyTorch 2.13
makes an ``addmm`` of such a sum where the change is a product of matrices, and forgets the factor. So whatever records
operations gets the factor as a multiplication of its own, which no fusion can lose; a compiler makes one step of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch.compiler import is_compiling

from graphpeft._torch import is_in_torch_dispatch_mode
from graphpeft.graph.recorded import as_node


def is_captured() -> bool:
    """Returns whether a compiler, an exporter or another recorder of PyTorch's operators reads what is computed."""
    return is_compiling() or is_in_torch_dispatch_mode()


def add_scaled(y: Any, change: Any, scale: Any) -> Any:
    """Returns y + s · change; with proxies it is one node of their graph.

    Args:
        y: The value that is changed.
        change: What is added to it.
        scale: s, a number; a tensor where an exported model is given it.
    """
    # this runs in each call of each adapted layer, where a general wrapper would take as long as a small sum
    if isinstance(y, fx.Proxy):
        return as_node(add_scaled, y, change, scale)
    if is_captured():
        return y + change * scale
    return torch.add(y, change, alpha=scale)
