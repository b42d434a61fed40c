"""Modules that are made of a forward and of what it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def module_of(forward, **members) -> Any:
    """Returns a module with this forward, and with these tensors, modules and attributes."""

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in members.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

    Made.forward = forward
    return Made()
