"""LoRA+: B learns faster than A.

    η_B = λ η_A                  λ: the ratio, greater than one

Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354; the same groups as
PEFT's ``optimizers/loraplus.py``.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.optim import Optimizer

from graphpeft.optimizers.products import adapted_model, file_keys, products


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """Returns an optimizer with a greater learning rate for B than for A.

    Its four groups are, as in PEFT: A, and all else that has more than one dimension; A and B of embeddings; B, and
    vectors; biases, and vectors of ``nn.LayerNorm``, without decay.

    Args:
        model: A model with adapters of LoRA.
        optimizer_cls: The class of the optimizer.
        lr: The learning rate of A.
        loraplus_lr_ratio: The learning rate of B, as a multiple of `lr`.
        kwargs: `loraplus_weight_decay`, 0.0 by default; `loraplus_lr_embedding`, the learning rate of embeddings, 1e-6
            by default; further options of the class.

    Returns:
        An instance of `optimizer_cls`.

    Raises:
        AdaptError: If the model trains no factors of LoRA.
        ValueError: If there is a `weight_decay`, which would have no effect.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
        >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
        [(0.0001, 1), (1e-06, 0), (0.0016, 1), (0.0016, 0)]
    """
    if "weight_decay" in kwargs:
        raise ValueError("weight_decay has no effect here, since each group has its own; pass loraplus_weight_decay")
    model = adapted_model(model)
    products(model, "LoRA+")
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    of_embeddings = kwargs.pop("loraplus_lr_embedding", 1e-6)
    rates = {
        "A": lr,
        "embedding": of_embeddings,
        "B": lr * loraplus_lr_ratio,
        "B without decay": lr * loraplus_lr_ratio,
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    keys = file_keys(model)
    of_norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = name.rpartition(".")[2]
            decays = "bias" not in own and id(parameter) not in of_norms
            members[_group(keys.get(id(parameter), ""), parameter, decays)].append(parameter)
    groups = [
        {"params": members[name], "lr": rate, "weight_decay": 0.0 if name == "B without decay" else decay}
        for name, rate in rates.items()
    ]
    optimizer = optimizer_cls(groups, **{"lr": lr, **kwargs})
    if optimizer_cls.__module__.partition(".")[0] == "bitsandbytes":
        _keep_embeddings_exact(model)
    return optimizer


def _group(key: str, parameter: nn.Parameter, decays: bool) -> str:
    if key.startswith("lora_embedding"):
        return "embedding"
    if not key.startswith("lora_B") and parameter.ndim != 1:
        return "A"
    return "B" if decays else "B without decay"


def _keep_embeddings_exact(model: nn.Module) -> None:
    """Lets optimizers of bitsandbytes have the state of embeddings in 32 bits, as its authors recommend."""
    manager = importlib.import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
