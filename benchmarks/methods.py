"""Each method's forward, training step, kept bytes and adapting on a Llama, beside PEFT's with the same values."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from cases import Cases
from llama import input_gradients, loss_of, training_step
from models import LIBRARIES, TARGETS, assert_close, copy_sharing_weights, llama
from rows import Row, Target, size
from timing import Effort, Ratio, Samples, calls, measure, once
from torch import nn

import graphpeft
from graphpeft.testing.memory import kept_bytes

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


def methods_time(effort: Effort) -> Cases:
    """Times a forward and a training step of each method."""
    return {method: functools.partial(_time_rows, method, effort) for method in methods()}


def methods_kept(effort: Effort) -> Cases:
    """Counts the bytes that a forward of each method keeps for the backward, which no round changes."""
    return {method: functools.partial(_kept_rows, method, effort) for method in methods()}


def methods_injection(effort: Effort) -> Cases:
    """Times `get_peft_model` with each method, on a Llama of few and small layers."""
    return {method: functools.partial(_injection_rows, method, effort) for method in methods()}


def methods() -> Iterator[str]:
    """Yields the methods that PEFT has and that adapt named layers; Poly also needs tasks in each call."""
    for name, config in graphpeft.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if issubclass(config, graphpeft.TargetedConfig) and name in [*graphpeft.PeftType] and name != "POLY":
            yield graphpeft.PeftType(name).value


def adapted_alike(method: str, base: nn.Module) -> dict[str, Any]:
    """Returns a copy of `base` by each library, with the same adapter, whose values aren't the first ones."""
    models = {library: _adapt(method, library, copy_sharing_weights(base)) for library in LIBRARIES}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in models["PEFT"].parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.01
    state = LIBRARIES["PEFT"].get_peft_model_state_dict(models["PEFT"])
    graphpeft.set_peft_model_state_dict(models["graphpeft"], state)
    return models


def _adapt(method: str, library: str, model: nn.Module) -> Any:
    package, name = LIBRARIES[library], graphpeft.PEFT_TYPE_TO_CONFIG_MAPPING[method].__name__
    config = getattr(package, name)(**{"target_modules": TARGETS} | OPTIONS.get(method, {}))
    torch.manual_seed(0)
    return package.get_peft_model(model, config)


def _sample(effort: Effort) -> tuple[nn.Module, torch.Tensor]:
    """Returns the model of times and bytes, and its tokens; C3A and VB-LoRA need sizes that 64 divides."""
    return llama(effort.of(512, 256), effort.of(8, 1)), torch.randint(0, 256, (2, 64))


def _kept_rows(method: str, effort: Effort) -> list[Row]:
    base, tokens = _sample(effort)
    models = adapted_alike(method, base)
    kept = {name: kept_bytes(functools.partial(loss_of, model.train(), tokens)) for name, model in models.items()}
    ours, theirs = kept["graphpeft"], kept["PEFT"]
    what, ratio = f"{method}: kept for the backward", Ratio.exactly(ours / theirs)
    return [Row(what, None, theirs, ours, "PEFT", ratio, Target.at_most(1.0), size)]


def _injection_rows(method: str, effort: Effort) -> list[Row]:
    make = functools.partial(copy_sharing_weights, llama(256, effort.of(4, 1)))
    candidates = {name: once(make, functools.partial(_adapt, method, name)) for name in LIBRARIES}
    return [_row(f"{method}: get_peft_model", measure(f"{method}: get_peft_model", candidates, effort), 0.15)]


def _time_rows(method: str, effort: Effort) -> Iterator[Row]:
    base, tokens = _sample(effort)
    models = adapted_alike(method, base)
    with torch.no_grad():
        runs = {name: functools.partial(model.eval(), input_ids=tokens) for name, model in models.items()}
        outputs = {name: run().logits for name, run in runs.items()}
        runs["base"] = functools.partial(base, input_ids=tokens)
        assert_close(method, outputs["graphpeft"], outputs["PEFT"], 1e-4)
        samples = measure(f"{method}: forward", {name: calls(run) for name, run in runs.items()}, effort)
    yield _row(f"{method}: forward", samples)
    steps = {name: calls(training_step(model.train(), tokens)) for name, model in models.items()}
    steps["base"] = calls(input_gradients(base, tokens))
    yield _row(f"{method}: training step", measure(f"{method}: training step", steps, effort))


def _row(what: str, samples: Samples, most: float = 1.05) -> Row:
    ratio = Ratio.of(samples["graphpeft"], samples["PEFT"])
    base = median(samples["base"]) if "base" in samples else None
    return Row(what, base, median(samples["PEFT"]), median(samples["graphpeft"]), "PEFT", ratio, Target.at_most(most))
