"""LoRA-FA: A is frozen, and B learns so that B A follows the gradient of the weight as closely as A allows.

    G'_B = G_B (A Aᵀ)⁻¹ / s²         G_B = s G_W Aᵀ, the gradient of B;  s G'_B A is the nearest to G_W
    AdamW with G'_B                  the step of Transformers' former AdamW: ε is added before the bias is corrected

Source: Zhang et al., "LoRA-FA", arXiv 2308.03303; the same numbers as PEFT's ``optimizers/lorafa.py``, which rounds
G'_B to bfloat16 where the machine knows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graphpeft.adapters.adapting import known_adapters
from graphpeft.adapters.plan import AdaptError
from graphpeft.optimizers.products import Product, adapted_model, damped_inverse, products, times_rank

DAMPING = 1e-8
"""The number that is added to A Aᵀ, as in PEFT."""


class LoraFAOptimizer(Optimizer):
    """AdamW, which gives B of LoRA the gradient of LoRA-FA.

    Args:
        params: Groups of parameters. One with `scaling_factors` consists of A and B in turn, as many pairs as it has
            factors. Its `axes` say of each parameter where the rank is. A is never changed.
        lr: The learning rate.
        betas: The decay of the averages of the gradient and of its square.
        eps: A number that is added to the root of the latter.
        weight_decay: The share by which parameters shrink in each step, times the learning rate.
        correct_bias: Whether the averages are corrected for their beginning at zero.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr is {lr}; choose one that isn't negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; choose them from 0 up to below 1")
        if eps < 0:
            raise ValueError(f"eps is {eps}; choose one that isn't negative")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Changes the parameters by their gradients.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            The result of `closure`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter, gradient in _gradients(group):
                self._change(parameter, gradient, group)
        return loss

    def _change(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        of_mean, of_square = group["betas"]
        state["exp_avg"].mul_(of_mean).add_(gradient, alpha=1 - of_mean)
        state["exp_avg_sq"].mul_(of_square).addcmul_(gradient, gradient, value=1 - of_square)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - of_square ** state["step"]) / (1 - of_mean ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _gradients(group: dict[str, Any]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Yields each parameter of a group that is to be changed, with its gradient."""
    parameters = group["params"]
    if "scaling_factors" not in group:
        yield from ((each, each.grad) for each in parameters if each.grad is not None)
        return
    axes = group["axes"]
    for index, scale in enumerate(group["scaling_factors"]):
        A, B = parameters[2 * index : 2 * index + 2]
        if B.grad is not None:
            of_a, of_b = axes[2 * index : 2 * index + 2]
            yield B, times_rank(damped_inverse(A, of_a, DAMPING) / scale**2, B.grad, of_b)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,  # noqa: ARG001
    lora_alpha: int,  # noqa: ARG001
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freezes A of a model's LoRA, and returns an optimizer for B, and for all else that is trained.

    A and B of embeddings are both trained, by AdamW, as everything beside A and B is.

    Args:
        model: A model with adapters of LoRA, of which those that are trained are meant.
        r: Accepted for compatibility with PEFT; each site has its own rank.
        lora_alpha: Likewise; each site has its own scale.
        lr: The learning rate.
        weight_decay: The weight decay.
        use_rslora: Whether scales are rank-stabilised; must be what the adapters' configs say. Leave it out.

    Returns:
        A `LoraFAOptimizer`.

    Raises:
        AdaptError: If the model trains no B of LoRA, or one whose columns don't go with the rows of its A: at grouped
            convolutions, and at parts of a projection.
        ValueError: If `use_rslora` isn't what a config says.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-3)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.default.lora_B']
    """
    model = adapted_model(model)
    if use_rslora is not None:
        _refuse_other_scales(model, use_rslora)
    pairs = [product for product in products(model, "LoRA-FA") if not product.is_embedding]
    for product in pairs:
        _refuse_unfit(product)
    for product in pairs:
        product.A.requires_grad_(False)
    of_pairs = {id(factor) for product in pairs for factor in (product.A, product.B)}
    others = [each for each in model.parameters() if each.requires_grad and id(each) not in of_pairs]
    groups: list[dict[str, Any]] = [
        {
            "params": [factor for product in pairs for factor in (product.A, product.B)],
            "axes": [axis for product in pairs for axis in product.axes],
            "scaling_factors": [product.scale for product in pairs],
        },
        {"params": others},
    ]
    return LoraFAOptimizer(groups, lr, weight_decay=weight_decay)


def _refuse_unfit(product: Product) -> None:
    if not product.B.requires_grad:
        raise AdaptError(
            f"LoRA-FA trains B, and the adapter at {product.label} trains A alone; choose another optimizer"
        )
    if not product.is_plain:
        raise AdaptError(
            f"LoRA-FA is for products of two matrices, which the adapter at {product.label} isn't: its groups or parts "
            "have ranks of their own in A alone; choose another optimizer"
        )


def _refuse_other_scales(model: nn.Module, use_rslora: bool) -> None:
    adapters = known_adapters(model)
    for name in adapters.active:
        of_config = bool(adapters.by_name[name].config.to_dict().get("use_rslora", False))
        if of_config != use_rslora:
            raise ValueError(
                f"use_rslora={use_rslora}, and the config of {name!r} has use_rslora={of_config}, by which it "
                "computes; leave the argument out"
            )
