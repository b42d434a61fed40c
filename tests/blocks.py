"""A small block on which passes are tried, and what it computes."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft import LoraConfig, get_peft_model, trace
from graphpeft.passes import PASSES


class Block(nn.Module):
    """Has three linear layers with one input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Linear(6, 6)
        self.o = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        scores = self.q(x) @ self.k(x).mT
        return self.o(torch.softmax(scores, -1) @ self.v(x))


TARGETS = ["q", "k", "v", "o"]


def block(form: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Returns an adapted block; equal calls give equal ones."""
    torch.manual_seed(0)
    model: Any = Block().to(dtype)
    if form == "flat":
        model = trace(model)
    config = LoraConfig(**{"r": 2, "target_modules": TARGETS, "init_lora_weights": False} | options)
    return get_peft_model(model, config)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def computed(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Returns what a model computes of `x`, with the random numbers of one seed, and the gradients of that."""
    torch.manual_seed(2)
    y = model(x)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # an adapter that is disabled gets none
    gradients = torch.autograd.grad(y.float().square().mean(), [x, *trained.values()], allow_unused=True)
    names = [name.removeprefix("_orig_mod.") for name in trained]
    found = zip(["y", "x", *names], [y, *gradients], strict=True)
    return {name: tensor for name, tensor in found if tensor is not None}


def assert_equal_within(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        difference = (found[name].float() - value.float()).abs().max()
        assert difference <= tolerance * max(1.0, float(value.detach().float().abs().max())), name


_FILES = "|".join([*(each.name for each in PASSES), "products", "recipes"])


def body_of(module: Any) -> list[str]:
    """Returns the statements of a graph module's forward, without what frees values and where functions come from."""
    lines = [
        re.sub(rf"graphpeft_passes_({_FILES})_", "", line.split(";")[0].strip()) for line in module.code.splitlines()
    ]
    return [line for line in lines if line and not line.startswith(("#", "def"))]
