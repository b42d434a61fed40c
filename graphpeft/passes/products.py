"""Products of a branch's input with its A's that save less memory for the backward than autograd would.

    d_i = dropout(h) A_iᵀ        h = x, or x in the dtype of the A's

Autograd saves dropout(h) for the gradients of the A's, and the dropout mask, which is as large, for the gradient of h.
The functions here save only x and the state of the random generator; the backward casts x again and draws the mask
again. The mask is the same as that of ``F.dropout``, so equal seeds give equal results.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphpeft.graph.recorded import recorded
from graphpeft.passes.plain_form import wants_plain_form, without_autocast
from graphpeft.passes.recipes import Recipe, computed_again


@recorded
def product(
    x: Tensor, h: Tensor, A: Tensor, probability: float = 0.0, training: bool = False, source: Recipe | None = None
) -> Tensor:
    """Returns dropout(h) Aᵀ, and saves x for the backward.

    Args:
        x: Of shape (…, in).
        h: x, or x cast to another dtype.
        A: Of shape (r, in).
        probability: The probability of dropping an element.
        training: Whether dropout is on.
        source: The recipe to compute x again instead of saving it; None saves x.
    """
    drops = training and probability > 0
    if wants_plain_form() or not torch.is_grad_enabled():
        return F.linear(F.dropout(h, probability, training), A)
    with computed_again([(x, source)]):
        if not drops and x.dtype == h.dtype:
            return F.linear(h, A)
        made: Any = _Products.apply(x, h, probability if drops else 0.0, A)
        return made[0]


@recorded
def products(x: Tensor, h: Tensor, source: Recipe | None, *factors: Tensor) -> tuple[Tensor, ...]:
    """Returns h Aᵀ for several A's from one product, and saves x for the backward if h is a cast.

    Args:
        x: Of shape (…, in).
        h: x, or x cast to another dtype.
        source: The recipe to compute x again instead of saving it; None saves x.
        factors: The A's, each of shape (r, in) with its own r.
    """
    if wants_plain_form() or any(A.dtype != factors[0].dtype for A in factors):
        return tuple([F.linear(cast_again(h, x, A.dtype), A) for A in factors])
    with computed_again([(x, source)]):
        if torch.is_grad_enabled() and x.dtype != h.dtype:
            made: Any = _Products.apply(x, h, 0.0, *factors)
            return made
        return F.linear(h, torch.cat(factors)).split([A.shape[0] for A in factors], -1)


@recorded
def cast_again(h: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x in `dtype`; this is `h`, a cast of x, if `h` has this dtype."""
    return h if h.dtype == dtype else x.to(dtype)


class _Products(torch.autograd.Function):
    """The products with a backward of differentiable operations, so that higher-order gradients work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, probability: float, *factors: Tensor) -> tuple[Tensor, ...]:
        """Returns the products."""
        state = _generator_state(h.device) if probability else None
        kept = h * _noise_like(h, probability) if probability else h
        # autocast may give the result another dtype than its operands have
        result = F.linear(kept, _stacked(factors))
        ctx.probability, ctx.dtype, ctx.product_dtype = probability, h.dtype, result.dtype
        ctx.save_for_backward(x, state, *factors)
        return result.split([A.shape[0] for A in factors], -1) if len(factors) > 1 else (result,)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Returns the gradients of x and of the A's."""
        x, state, *factors = ctx.saved_tensors
        of_x, of_factors = None, [None] * len(factors)
        # the dtypes of the forward, even if the backward runs under autocast
        with without_autocast(x.device.type):
            h = x.to(ctx.dtype)
            noise = None if state is None else _noise_again(h, ctx.probability, state)
            gradient, *others = gradients
            gradient = torch.cat((gradient, *others), -1) if others else gradient
            if ctx.needs_input_grad[0]:
                of_kept = (gradient @ _stacked(factors).to(ctx.product_dtype)).to(ctx.dtype)
                of_x = (of_kept if noise is None else of_kept * noise).to(x.dtype)
            if any(ctx.needs_input_grad[3:]):
                kept = (h if noise is None else h * noise).to(ctx.product_dtype)
                of_all = gradient.reshape(-1, gradient.shape[-1]).t() @ kept.reshape(-1, kept.shape[-1])
                of_factors = of_all.to(factors[0].dtype).split([A.shape[0] for A in factors])
        return of_x, None, None, *of_factors


def _stacked(factors: Any) -> Tensor:
    return torch.cat(tuple(factors)) if len(factors) > 1 else factors[0]


def _noise_like(h: Tensor, probability: float) -> Tensor:
    """Returns the factors of ``F.dropout``: 0 for a dropped element of `h`, else 1 / (1 − p)."""
    if h.device.type == "cpu":
        return torch.empty_like(h).bernoulli_(1 - probability).div_(1 - probability)
    # other devices draw and multiply in one kernel, whose mask depends on the memory alignment of its input: h may be
    # aligned differently than a copy of it
    return F.dropout(torch.ones_like(h), probability, True)


@torch.no_grad()
def _noise_again(h: Tensor, probability: float, state: Tensor) -> Tensor:
    """Returns the result of `_noise_like` with the random generator in `state`."""
    where = _device_argument(h.device)
    before = _generators(h.device).get_rng_state(*where)
    _generators(h.device).set_rng_state(state, *where)
    try:
        return _noise_like(h, probability)
    finally:
        _generators(h.device).set_rng_state(before, *where)


def _generator_state(device: torch.device) -> Tensor:
    return _generators(device).get_rng_state(*_device_argument(device))


def _generators(device: torch.device) -> Any:
    """Returns PyTorch's module with the functions for random generators of this device type."""
    return torch.random if device.type == "cpu" else torch.get_device_module(device)


def _device_argument(device: torch.device) -> tuple[torch.device, ...]:
    """Returns the device argument of these functions; the functions for the CPU have none."""
    return () if device.type == "cpu" else (device,)
