"""Adapted models and the loop that trains one, for workflows of any tool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def adapted(peft: Any, model: Any, *targets: str, **options: Any) -> Any:
    """Returns a model with LoRA, the same at each call, whose changes are felt from the first step on."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(targets) or None, "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**settings | options))


def trained(model: Any) -> list[Tensor]:
    """Returns what an optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fit(model: Any, loss: Callable[[], Tensor], *, steps: int = 3, lr: float = 0.05) -> list[float]:
    """Trains a model, and returns the loss of each step."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(trained(model), lr=lr)
    losses = []
    for _ in range(steps):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Asserts that a workflow has kept what a model computes."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
