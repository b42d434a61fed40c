"""Stacks of experts' matrices: a batched and a grouped product, forward and backward, beside PEFT's and the base's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import peft
import torch
from cases import Cases
from rows import Row, Target
from timing import Effort, Ratio, calls, measure
from torch import Tensor, nn

import graphpeft
from graphpeft._torch import GROUPED_MM

EXPERTS, FEATURES, TOKENS = 64, 256, 32
OFFSETS = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * TOKENS


class Batched(nn.Module):
    """One product for each expert, as one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, FEATURES, FEATURES) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.view(EXPERTS, TOKENS, FEATURES), self.w)


class Grouped(Batched):
    """The same for tokens in the order of their experts."""

    def forward(self, x: Tensor) -> Tensor:
        return GROUPED_MM[0](x, self.w, offs=OFFSETS)


def experts_time(effort: Effort) -> Cases:
    """Times forward and backward of both products."""
    return {cls.__name__: functools.partial(_rows, cls, effort) for cls in (Batched, Grouped)}


def _rows(cls: type[nn.Module], effort: Effort) -> Iterator[Row]:
    torch.manual_seed(0)
    base = nn.ModuleDict({"experts": cls()}).requires_grad_(False)
    options: dict[str, Any] = {"r": 8, "lora_alpha": 5, "init_lora_weights": False}
    torch.manual_seed(1)
    ours = graphpeft.get_peft_model(copy.deepcopy(base), graphpeft.LoraConfig(**options, target_modules=["experts.w"]))
    torch.manual_seed(1)
    named = peft.LoraConfig(**options, target_modules=[], target_parameters=["experts.w"])
    theirs = peft.get_peft_model(copy.deepcopy(base), named)
    graphpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    layers: dict[str, Any] = {"base": base["experts"], "graphpeft": ours["experts"]}
    layers["PEFT"] = theirs.base_model.model["experts"]
    x = torch.randn(EXPERTS * TOKENS, FEATURES)
    torch.testing.assert_close(layers["graphpeft"](x), layers["PEFT"](x), atol=1e-4, rtol=1e-4)
    samples = measure(cls.__name__, {name: calls(_step(layer, x)) for name, layer in layers.items()}, effort)
    for other, target in (("base", 1.4), ("PEFT", 0.6)):
        ratio = Ratio.of(samples["graphpeft"], samples[other])
        medians = [median(samples[name]) for name in ("base", "PEFT", "graphpeft")]
        yield Row(f"{cls.__name__} experts: step", *medians, other, ratio, Target.at_most(target))


def _step(layer: Any, x: Tensor) -> Callable[[], None]:
    given = x.requires_grad_()

    def step() -> None:
        given.grad = None
        layer(given).square().mean().backward()

    return step
