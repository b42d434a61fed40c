"""A Llama's forward and training step: with adapters, with them disabled, and merged."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from cases import Cases
from models import LIBRARIES, adapted, adapter_gradients, assert_close, llama
from rows import Row, Target
from timing import Effort, Ratio, Samples, calls, measure
from torch import nn


class Size(NamedTuple):
    """A model's size and that of its inputs, with the targets that apply."""

    name: str
    hidden: int
    layers: int
    tokens: tuple[int, int]
    forward_to_peft: Target | None
    forward_to_base: Target | None
    training_to_peft: Target


def sizes(effort: Effort) -> tuple[Size, Size]:
    """Returns a model whose time goes into arithmetic, and one whose time goes into launching it."""
    # on one thread PEFT's own forward is at most 1.11 × the base's, so no other can take 0.90 of it
    large = Target.at_most(0.90) if torch.get_num_threads() > 1 else None
    base = Target.at_most(1.06)
    hidden, layers, few = effort.of(512, 64), effort.of(8, 1), effort.of(4, 1)
    return (
        Size("Llama 512 × 8, 2 × 64 tokens", hidden, layers, (2, 64), large, base, Target.at_most(0.97)),
        Size("Llama 64 × 4, 1 token", 64, few, (1, 1), Target.at_most(0.65), None, Target.at_most(0.80)),
    )


def forward_time(effort: Effort) -> Cases:
    """Times the forward without gradients."""
    return {size.name: functools.partial(_forward_rows, size, effort) for size in sizes(effort)}


def training_time(effort: Effort) -> Cases:
    """Times forward, backward and the optimizer's step."""
    return {size.name: functools.partial(_training_rows, size, effort) for size in sizes(effort)}


# forward


def _forward_rows(size: Size, effort: Effort) -> list[Row]:
    base = llama(size.hidden, size.layers)
    tokens = torch.randint(0, 256, size.tokens)
    models = {"base": base, "base copied": copy.deepcopy(base)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for library in LIBRARIES:
            models[f"{library} on"] = adapted(base, library)
            models[f"{library} off"] = off = adapted(base, library)
            stack.enter_context(off.disable_adapter())
            models[f"{library} merged"] = adapted(copy.deepcopy(base), library).merge_and_unload()
        _check_outputs({name: model(input_ids=tokens).logits for name, model in models.items()})
        candidates = {name: calls(functools.partial(model, input_ids=tokens)) for name, model in models.items()}
        samples = measure(f"forward, {size.name}", candidates, effort)

    what = f"{size.name}: forward"
    return [
        _row(f"{what}, adapters on", samples, "on", "PEFT on", size.forward_to_peft),
        _row(f"{what}, adapters on", samples, "on", "base", size.forward_to_base),
        _row(f"{what}, disabled", samples, "off", "base", Target.equal()),
        _row(f"{what}, merged", samples, "merged", "base copied", Target.equal()),
        _noise(f"{what}, base against its copy", samples),
    ]


def _check_outputs(outputs: dict[str, torch.Tensor]) -> None:
    base, on = outputs["base"], outputs["PEFT on"]
    assert (on - base).abs().max() > 0.01 * base.abs().max(), "the adapters should change the outputs"
    for name, value in outputs.items():
        assert_close(name, value, on if name.endswith(("on", "merged")) else base)


# training


def _training_rows(size: Size, effort: Effort) -> list[Row]:
    base = llama(size.hidden, size.layers)
    tokens = torch.randint(0, 256, size.tokens)
    steps: dict[str, Callable[[], object]] = {"base": input_gradients(base, tokens)}
    for dropout in (0.0, 0.05):
        models = {library: adapted(base, library, dropout).train() for library in LIBRARIES}
        check_training(models, tokens, dropout)
        for library, model in models.items():
            steps[f"{library} {dropout}"] = training_step(model, tokens)
    candidates = {name: calls(step) for name, step in steps.items()}
    samples = measure(f"training step, {size.name}", candidates, effort)
    what = f"{size.name}: training step"
    return [
        _row(what, samples, "0.0", "PEFT 0.0", size.training_to_peft),
        _row(f"{what}, dropout 0.05", samples, "0.05", "PEFT 0.05", Target.at_most(0.95)),
    ]


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    # the logits themselves, as a loss over one token would be empty
    return model(input_ids=tokens).logits.square().mean()


def training_step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()

    return step


def input_gradients(base: Any, tokens: torch.Tensor) -> Callable[[], None]:
    """Returns the least that training any adapter takes: the forward, and the gradient of the inputs."""
    embedded = base.get_input_embeddings()(tokens).detach().requires_grad_()

    def step() -> None:
        embedded.grad = None
        base(inputs_embeds=embedded).logits.square().mean().backward()

    return step


def check_training(models: dict[str, Any], tokens: torch.Tensor, dropout: float) -> None:
    """Makes sure that both libraries train the same tensors, with the same gradients where there is no chance in it."""
    gradients, losses = {}, {}
    for library, model in models.items():
        model.zero_grad()  # it may have been compared with another one before
        torch.manual_seed(1)
        losses[library] = loss_of(model, tokens)
        losses[library].backward()
        gradients[library] = adapter_gradients(model)
        assert (dropout > 0) == bool(loss_of(model, tokens) != losses[library]), "dropout should change the loss"
    peft, ours = gradients["PEFT"], gradients["graphpeft"]
    assert peft.keys() == ours.keys()
    # of a single token, the gradients of queries and keys are nothing but rounding
    noise = 1e-6 * max(gradient.abs().max().item() for gradient in peft.values())
    for name in peft if dropout == 0 else ():
        assert_close(name, ours[name], peft[name], noise)


# rows


def _row(what: str, samples: Samples, ours: str, other: str, target: Target | None) -> Row:
    base = median(samples["base copied" if other == "base copied" else "base"])
    peft, graphpeft = samples[f"PEFT {ours}"], samples[f"graphpeft {ours}"]
    ratio = Ratio.of(graphpeft, samples[other])
    return Row(what, base, median(peft), median(graphpeft), other.split()[0], ratio, target)


def _noise(what: str, samples: Samples) -> Row:
    ratio = Ratio.of(samples["base copied"], samples["base"])
    return Row(what, median(samples["base"]), None, None, "base", ratio, noise=True)
