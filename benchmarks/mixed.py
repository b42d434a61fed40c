"""A batch whose rows have different adapters."""

from __future__ import annotations

import functools
from statistics import median
from typing import Any

import torch
from cases import Cases
from models import LIBRARIES, TARGETS, assert_close, copy_sharing_weights, llama
from rows import Row, Target
from timing import Effort, Ratio, calls, measure
from torch import nn


def mixed_time(effort: Effort) -> Cases:
    """Times one forward of as many rows as there are adapters, each row with its own."""
    return {
        f"{count} adapters": functools.partial(_rows, count, most, effort) for count, most in ((8, 0.30), (32, 0.25))
    }


def _rows(count: int, most: float, effort: Effort) -> list[Row]:
    base = llama(64, effort.of(4, 1))
    names = [f"adapter{index}" for index in range(effort.of(count, 2))]
    tokens = torch.randint(0, 256, (len(names), 1))
    models = {library: _adapted(base, library, names) for library in LIBRARIES}
    with torch.no_grad():
        outputs = {name: model(input_ids=tokens, adapter_names=names).logits for name, model in models.items()}
        assert_close("mixed batch", outputs["graphpeft"], outputs["PEFT"])
        candidates = {"base": calls(functools.partial(base, input_ids=tokens))}
        for library, model in models.items():
            candidates[library] = calls(functools.partial(model, input_ids=tokens, adapter_names=names))
        samples = measure(f"mixed batch, {count} adapters", candidates, effort)
    what = f"Llama 64 × 4, mixed batch, {count} rows × 1 token, {count} adapters"
    times = [median(samples[name]) for name in ("base", "PEFT", "graphpeft")]
    return [Row(what, *times, "PEFT", Ratio.of(samples["graphpeft"], samples["PEFT"]), Target.at_most(most))]


def _adapted(base: nn.Module, library: str, names: list[str]) -> Any:
    """Returns a copy of `base` with these adapters, whose values are equal in both libraries."""
    package: Any = LIBRARIES[library]
    config = functools.partial(package.LoraConfig, r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = package.get_peft_model(copy_sharing_weights(base), config(), names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    for seed, name in enumerate(names):
        state = package.get_peft_model_state_dict(model, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        values = {key: torch.randn(state[key].shape, generator=generator) * 0.02 for key in sorted(state)}
        package.set_peft_model_state_dict(model, values, adapter_name=name)
    return model.eval()
