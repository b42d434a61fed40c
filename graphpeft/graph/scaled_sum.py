"""Adds a scaled change: y + s · change.

``torch.add(y, change, alpha=s)`` does that in one step. But where the change is a matrix product, the default backend
of ``torch.compile`` in PyTorch 2.13 fuses the sum into an ``addmm`` and loses the factor. So captured code multiplies
by the factor separately, which no fusion can lose; a compiler still makes one step of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch.compiler import is_compiling

from graphpeft._torch import is_in_torch_dispatch_mode
from graphpeft.graph.recorded import as_node


def is_captured() -> bool:
    """Returns whether a compiler, an exporter or another recorder of PyTorch's operators captures the computation."""
    return is_compiling() or is_in_torch_dispatch_mode()


def add_scaled(y: Any, change: Any, scale: Any) -> Any:
    """Returns y + s · change; with proxies, one node of their graph."""
    # without @recorded: in each call of each adapted layer, its wrapper would take as long as a small sum
    if isinstance(y, fx.Proxy):
        return as_node(add_scaled, y, change, scale)
    # only a number can be alpha, and no tensor that is trained
    if is_captured() or getattr(scale, "requires_grad", False):
        return y + change * scale
    return torch.add(y, change, alpha=scale)
