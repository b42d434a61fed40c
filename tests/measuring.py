"""Runs models for first values of LoRA that are measured, and PEFT's functions for that, which the CPU can run."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from models import call, result
from peft.tuners.lora.loraga import preprocess_loraga as preprocess_loraga_of_peft
from peft.utils import loftq_utils
from torch import nn

# PEFT's CorDA imports attrs for this one name, and doesn't ask for it to be installed
with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda as preprocess_corda_of_peft

__all__ = [
    "backwards",
    "batches",
    "forwards",
    "let_peft_round_on_the_cpu",
    "preprocess_corda_of_peft",
    "preprocess_loraga_of_peft",
]


def forwards(model: nn.Module, case: Any) -> Callable[[], None]:
    """Returns a function that runs samples of one sequence, as PEFT's CorDA takes them."""

    def run() -> None:
        given = case.inputs()
        values = list(given.items() if isinstance(given, dict) else enumerate(given))
        for index in range(2):
            one = {key: v[index : index + 1] if isinstance(v, torch.Tensor) else v for key, v in values}
            call(model, one if isinstance(given, dict) else tuple(one.values()))

    return run


def backwards(model: nn.Module, case: Any) -> Callable[[], None]:
    """Returns a function that runs forwards and backwards."""

    def run() -> None:
        for _ in range(2):
            result(call(model, case.inputs())).square().mean().backward()

    return run


def batches(case: Any, count: int = 3) -> list[Any]:
    """Returns batches for EVA: tokens, or vectors for the model's first argument."""
    generator = torch.Generator().manual_seed(9)
    inputs = case.inputs()
    if isinstance(inputs, dict):
        return [{"input_ids": torch.randint(3, 60, (4, 10), generator=generator)} for _ in range(count)]
    [name, *_] = inspect.signature(case.build().forward).parameters
    _, *middle, width = inputs[0].shape
    # neither all directions nor all layers are alike
    scale = torch.arange(1.0, width + 1)
    return [{name: torch.randn(12, *middle, width, generator=generator) * scale} for _ in range(count)]


def let_peft_round_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets PEFT's LoftQ, which asks for a GPU, run here."""

    def flat(state: Any) -> Any:
        # on the CPU, bitsandbytes 0.50 dequantises rows that aren't multiples of its blocks wrongly
        state.shape = torch.Size([state.shape.numel()])
        return state

    source = inspect.getsource(loftq_utils.loftq_init)
    for there, here in (
        ('else "cuda"', 'else "cpu"'),
        (
            "dequantize_4bit(qweight.data, qweight.quant_state)",
            "dequantize_4bit(qweight.data, flat(qweight.quant_state)).view_as(res)",
        ),
    ):
        assert there in source
        source = source.replace(there, here)
    namespace = {**vars(loftq_utils), "flat": flat}
    exec(source, namespace)
    monkeypatch.setattr(peft.tuners.lora.layer, "loftq_init", namespace["loftq_init"])
