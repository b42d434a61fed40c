"""Norms as they are told."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_of(tensor: Tensor) -> float:
    """Returns the norm of a tensor, which is summed in float32 at least."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=wide))
