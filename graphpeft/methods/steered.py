"""Factors whose gradients have no part in some directions.

∂F ← Q Qᵀ ∂F, or ∂F ← ∂F − Q Qᵀ ∂F        Q: orthonormal columns
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphpeft.graph.recorded import recorded


@recorded
def steered(factor: Tensor, frame: Tensor, is_inside: bool) -> Tensor:
    """Returns a factor whose gradient is projected onto the span of a frame's columns, or off it.

    Args:
        factor: The factor, (…, n, r).
        frame: Orthonormal columns, (…, n, k).
        is_inside: Whether the gradient is in the span; else it is orthogonal to it.
    """
    steered: Any = _Steered.apply(factor, frame, is_inside)
    return steered


class _Steered(torch.autograd.Function):
    """The identity, with a projection of the gradient; a hook on the parameter would be lost in its copies."""

    generate_vmap_rule = True

    @staticmethod
    def forward(factor: Tensor, frame: Tensor, is_inside: bool) -> Tensor:
        """Returns the factor."""
        return factor.view_as(factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the frame."""
        _, frame, ctx.is_inside = inputs
        ctx.save_for_backward(frame)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the projected gradient."""
        (frame,) = ctx.saved_tensors
        (gradient,) = gradients
        inside = frame @ (frame.mT @ gradient)
        return inside if ctx.is_inside else gradient - inside, None, None
