"""Each method's forward and training step on a Llama, beside PEFT's with the same values."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from llama import training_step
from models import LIBRARIES, TARGETS, assert_close, copy_sharing_weights, llama
from timing import Ratio, Row, Samples, Target, calls, measure
from torch import nn

import graphpeft

OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 1000},
    "C3A": {"block_size": 64},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "LORA": {"r": 8, "lora_alpha": 16},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": list(range(16))},
    "VBLORA": {"vector_length": 64},
}
"""Options that a method needs, or whose defaults don't fit a Llama."""


def methods_time(rounds: int) -> list[Row]:
    """Times a forward and a training step of each method."""
    base = llama(512, 8)
    tokens = torch.randint(0, 256, (2, 64))
    return [row for method in methods() for row in _rows(method, base, tokens, rounds)]


def methods() -> Iterator[str]:
    """Yields the methods that PEFT has and that adapt named layers; Poly also needs tasks in each call."""
    for name, config in graphpeft.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if issubclass(config, graphpeft.TargetedConfig) and name in [*graphpeft.PeftType] and name != "POLY":
            yield graphpeft.PeftType(name).value


def adapted_alike(method: str, base: nn.Module) -> dict[str, Any]:
    """Returns a copy of `base` by each library, with the same adapter, whose values aren't the first ones."""
    name = graphpeft.PEFT_TYPE_TO_CONFIG_MAPPING[method].__name__
    models: dict[str, Any] = {}
    for library, package in LIBRARIES.items():
        config = getattr(package, name)(**{"target_modules": TARGETS} | OPTIONS.get(method, {}))
        torch.manual_seed(0)
        models[library] = package.get_peft_model(copy_sharing_weights(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in models["PEFT"].parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.01
    state = LIBRARIES["PEFT"].get_peft_model_state_dict(models["PEFT"])
    graphpeft.set_peft_model_state_dict(models["graphpeft"], state)
    return models


def _rows(method: str, base: nn.Module, tokens: torch.Tensor, rounds: int) -> Iterator[Row]:
    models = adapted_alike(method, base)
    with torch.no_grad():
        runs = {name: functools.partial(model.eval(), input_ids=tokens) for name, model in models.items()}
        outputs = {name: run().logits for name, run in runs.items()}
        assert_close(method, outputs["graphpeft"], outputs["PEFT"], 1e-4)
        samples = measure(f"{method}: forward", {name: calls(run) for name, run in runs.items()}, rounds)
    yield _row(f"{method}: forward", samples)
    steps = {name: calls(training_step(model.train(), tokens)) for name, model in models.items()}
    yield _row(f"{method}: training step", measure(f"{method}: training step", steps, rounds))


def _row(what: str, samples: Samples) -> Row:
    ratio = Ratio.of(samples["graphpeft"], samples["PEFT"])
    return Row(what, None, median(samples["PEFT"]), median(samples["graphpeft"]), "PEFT", ratio, Target.at_most(1.05))
