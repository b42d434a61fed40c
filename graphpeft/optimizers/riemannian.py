"""Any optimizer on gradients of A and B that don't depend on how the product B A is parted into the two.

    G'_A = (Bᵀ B + δ I)⁻¹ G_A
    G'_B = G_B (A Aᵀ + δ I)⁻¹            δ: a damping, `reg`

Source: Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv 2402.02347; the
same numbers as PEFT's ``optimizers/riemannian.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graphpeft.optimizers.products import adapted_model, damped_inverse, products, times_rank


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """Returns an optimizer that multiplies the gradients of A and B by matrices of the size of the rank before a step.

    These are A and B that are matrices and both trained; those of embeddings and convolutions are trained as all else
    is. In a saved state dict, they are the first group.

    Args:
        model: A model with adapters of LoRA.
        optimizer_cls: The class of the optimizer.
        lr: The learning rate.
        reg: The damping δ.
        kwargs: Further options of the class.

    Returns:
        An instance of a subclass of `optimizer_cls`.

    Raises:
        AdaptError: If the model trains no factors of LoRA.
        TypeError: If `optimizer_cls` is no class of optimizers.
        ValueError: If there are none that are matrices, or a step of the class computes gradients anew.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-4)
        >>> isinstance(optimizer, torch.optim.AdamW)
        True
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls is {optimizer_cls!r}; pass a class such as torch.optim.AdamW")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"a step of {optimizer_cls.__name__} computes gradients anew by a closure, after they were multiplied; "
            "choose one that takes a step by given gradients, such as AdamW"
        )
    model = adapted_model(model)
    pairs = [
        product
        for product in products(model, "this optimizer")
        if not product.is_embedding and product.is_plain
        if all(factor.ndim == 2 and factor.requires_grad for factor in (product.A, product.B))
    ]
    if not pairs:
        raise ValueError(
            "no A and B are matrices that are both trained, which alone the optimizer is for; adapt linear layers, or "
            "take another optimizer"
        )
    factors = [factor for product in pairs for factor in (product.A, product.B)]
    of_pairs = set(map(id, factors))
    others = [each for each in model.parameters() if each.requires_grad and id(each) not in of_pairs]
    axes = [axis for product in pairs for axis in product.axes]
    groups = [{"params": factors, "rank_axes": axes, "reg": reg}, *([{"params": others}] if others else [])]
    return _riemannian(optimizer_cls)(groups, lr=lr, **kwargs)


@functools.cache
def _riemannian(optimizer_cls: Any) -> Any:
    """Returns the subclass of an optimizer's class; copies and pickles of instances find it by this function."""

    class Riemannian(optimizer_cls):
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if closure is not None:
                raise ValueError(
                    "a closure computes gradients anew, after they were multiplied; call step() without one"
                )
            for group in self.param_groups:
                if "rank_axes" in group:
                    _multiply(group)
            # without PyTorch's wrapper, or hooks would run a second time
            step = optimizer_cls.step
            return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)

        def __reduce__(self) -> Any:
            return _empty, (optimizer_cls,), self.__getstate__()

    Riemannian.__name__ = Riemannian.__qualname__ = f"Riemannian{optimizer_cls.__name__}"
    return Riemannian


def _empty(optimizer_cls: Any) -> Any:
    cls = _riemannian(optimizer_cls)
    return cls.__new__(cls)


def _multiply(group: dict[str, Any]) -> None:
    """Multiplies the gradients of a group of pairs of factors, in place."""
    parameters, axes = group["params"], group["rank_axes"]
    for first in range(0, len(parameters), 2):
        pair = [(parameters[index], axes[index]) for index in (first, first + 1)]
        for (factor, axis), (other, axis_of_other) in (pair, pair[::-1]):
            if factor.grad is not None:
                inverse = damped_inverse(other, axis_of_other, group["reg"])
                factor.grad.copy_(times_rank(inverse, factor.grad, axis))
