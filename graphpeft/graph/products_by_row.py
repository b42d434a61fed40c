"""Products of a batch with matrices of which each row has its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphpeft.graph.scaled_sum import add_scaled


def products_by_row(y: Tensor, h: Tensor, first: Tensor, second: Tensor, scaling: Any) -> Tensor:
    """Returns y + s · h · first · second, with other matrices for each row.

    Args:
        y: Of shape (rows, …, out).
        h: Of shape (rows, …, in).
        first: Of shape (rows, in, r).
        second: Of shape (rows, r, out).
        scaling: A number, or one for each row.
    """
    down = torch.bmm(h.reshape(h.shape[0], -1, h.shape[-1]), first)
    if isinstance(scaling, Tensor):
        down, scaling = down * scaling.to(down).view(-1, 1, 1), 1
    flat = y.reshape(y.shape[0], -1, y.shape[-1])
    if flat.dtype == down.dtype:
        return torch.baddbmm(flat, down, second, alpha=scaling).view(y.shape)
    return add_scaled(flat, torch.bmm(down, second), scaling).view(y.shape)


def dropped_by_row(h: Tensor, probability: Any) -> Tensor:
    """Returns `h`, (rows, …), with elements dropped, by one probability or by one for each row; 0 drops none."""
    if not isinstance(probability, Tensor):
        return F.dropout(h, probability)
    kept = 1 - probability.to(h).view(-1, *(1 for _ in h.shape[1:]))
    return h * torch.bernoulli(kept.expand_as(h)) / kept
