"""What passes make of a Llama's forward and training step, in time and in bytes that are kept for the backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from cases import Cases
from llama import Size, check_training, input_gradients, loss_of, sizes, training_step
from models import TARGETS, adapted, assert_close, copy_sharing_weights, llama
from rows import Row, Target, size
from timing import Effort, Ratio, Samples, calls, measure
from torch import Tensor, nn

import graphpeft
from graphpeft.testing.memory import kept_bytes

LAUNCHES = ("flattened_rows", "inplace_addmm")
TIME = ("inplace_addmm",)
GROUPED = ("grouped_products", "inplace_addmm")
MEMORY = ("regenerated_dropout", "recomputed_casts", "inplace_addmm")
RECOMPUTED = ("regenerated_dropout", "recomputed_casts", "grouped_products", "recomputed_inputs", "inplace_addmm")
DROPOUT = 0.05

_SHORT: dict[Sequence[str], str] = {RECOMPUTED: "all passes for memory"}


def passes_time(effort: Effort) -> Cases:
    """Times the forward and the training step, each with the passes that serve it best."""
    large, small = sizes(effort)
    forward, training = functools.partial(_forward_rows, effort), functools.partial(_training_rows, effort)
    to_peft, dropped = large.training_to_peft, Target.at_most(0.95)
    return {
        f"forward, {large.name}": functools.partial(forward, large, TIME),
        f"forward, {small.name}": functools.partial(forward, small, LAUNCHES),
        f"training, {large.name}": functools.partial(training, large, 0.0, (TIME, GROUPED, RECOMPUTED), to_peft),
        f"training, {small.name}": functools.partial(training, small, 0.0, (LAUNCHES,), small.training_to_peft),
        f"dropout, {large.name}": functools.partial(training, large, DROPOUT, (TIME, MEMORY, RECOMPUTED), dropped),
    }


def kept_for_backward(effort: Effort) -> Cases:
    """Counts what is kept for the backward, which no round changes."""
    large, _ = sizes(effort)
    single, half = (functools.partial(_kept, large, dtype) for dtype in (torch.float32, torch.bfloat16))
    block = f"{large.name}: kept for the backward"
    return {
        "plain": lambda: _kept_rows(block, single(0.0, RECOMPUTED), Target.at_most(0.75)),
        "dropout": lambda: _kept_rows(f"{block}, dropout {DROPOUT}", single(DROPOUT, RECOMPUTED), Target.at_most(0.60)),
        "bfloat16": lambda: _kept_rows(f"{block}, bfloat16", half(0.0, RECOMPUTED), None),
        "adapters": lambda: _kept_by_adapters(f"{block} by the adapters alone, bfloat16", half(0.0, MEMORY)),
    }


def compiled_time(effort: Effort) -> Cases:
    """Times the training step under ``torch.compile``, which must take each model whole."""
    return {"compiled": functools.partial(_compiled_rows, effort)}


# time


def _compiled_rows(effort: Effort) -> list[Row]:
    base = llama(effort.of(256, 64), effort.of(2, 1))
    tokens = torch.randint(0, 256, (2, 64))
    models = {"PEFT": adapted(base, "PEFT").train(), "graphpeft": _optimized(base, 0.0, TIME, tokens)}
    check_training(models, tokens, 0.0)
    steps = {}
    for name, model in models.items():
        torch.compiler.reset()
        steps[name] = calls(training_step(torch.compile(model, fullgraph=True), tokens))
        steps[name]()  # compiles
    samples = measure("training step, compiled", steps, effort)
    what = "Llama 256 × 2, 2 × 64 tokens: training step, torch.compile(fullgraph=True)"
    ratio = Ratio.of(samples["graphpeft"], samples["PEFT"])
    return [Row(what, None, median(samples["PEFT"]), median(samples["graphpeft"]), "PEFT", ratio, Target.at_most(1.01))]


def _forward_rows(effort: Effort, case: Size, passes: Sequence[str]) -> list[Row]:
    base = llama(case.hidden, case.layers)
    tokens = torch.randint(0, 256, case.tokens)
    models = {"base": base, "PEFT": adapted(base, "PEFT"), "ours": _optimized(base, 0.0, passes, tokens).eval()}
    with torch.no_grad():
        assert_close("forward", models["ours"](input_ids=tokens).logits, models["PEFT"](input_ids=tokens).logits)
        candidates = {name: calls(functools.partial(model, input_ids=tokens)) for name, model in models.items()}
        samples = measure(f"forward, {case.name}", candidates, effort)
    what = f"{case.name}: forward, {', '.join(passes)}"
    times = [median(samples[name]) for name in ("base", "PEFT", "ours")]
    return [
        Row(what, *times, other, Ratio.of(samples["ours"], samples[other]), target)
        for other, target in (("PEFT", case.forward_to_peft), ("base", case.forward_to_base))
        if target is not None
    ]


def _training_rows(
    effort: Effort, case: Size, dropout: float, variants: Sequence[Sequence[str]], target: Target | None
) -> list[Row]:
    base = llama(case.hidden, case.layers)
    tokens = torch.randint(0, 256, case.tokens)
    models = {"PEFT": adapted(base, "PEFT", dropout).train()}
    for passes in variants:
        models[_named(passes)] = _optimized(base, dropout, passes, tokens)
        check_training({"PEFT": models["PEFT"], "graphpeft": models[_named(passes)]}, tokens, dropout)
    samples = _training_samples(case, base, tokens, models, effort)
    times = median(samples["base"]), median(samples["PEFT"])
    what = f"{case.name}: training step, " + (f"dropout {dropout}, " if dropout else "")
    return [
        Row(what + how, *times, median(samples[how]), "PEFT", Ratio.of(samples[how], samples["PEFT"]), target)
        for how in list(models)[1:]
    ]


def _training_samples(case: Size, base: nn.Module, tokens: Tensor, models: dict[str, Any], effort: Effort) -> Samples:
    steps = {"base": calls(input_gradients(base, tokens))}
    steps |= {name: calls(training_step(model, tokens)) for name, model in models.items()}
    return measure(f"training step with passes, {case.name}", steps, effort)


def _named(passes: Sequence[str]) -> str:
    return ("traced, " if _needs_trace(passes) else "") + _SHORT.get(tuple(passes), ", ".join(passes))


def _needs_trace(passes: Sequence[str]) -> bool:
    """Returns whether passes look at several layers at once."""
    return not {"grouped_products", "recomputed_inputs"}.isdisjoint(passes)


def _optimized(base: nn.Module, dropout: float, passes: Sequence[str], tokens: Tensor) -> Any:
    """Returns an adapted copy of `base` in training, with passes, as a flat graph if these need one."""
    model = adapted(base, "graphpeft", dropout)
    if _needs_trace(passes):
        state = graphpeft.get_peft_model_state_dict(model)
        config = graphpeft.LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS)
        model = graphpeft.trace(copy_sharing_weights(base).train(), {"input_ids": tokens})
        model = graphpeft.get_peft_model(model, config)
        graphpeft.set_peft_model_state_dict(model, state)
    graphpeft.optimize(model, passes)
    return model.train()


# bytes


class Kept(NamedTuple):
    """The bytes that the base keeps for the gradient of its input, and that both libraries keep for a step."""

    base: int
    peft: int
    ours: int
    passes: Sequence[str]


def _kept_rows(what: str, kept: Kept, target: Target | None) -> list[Row]:
    ratio = Ratio.exactly(kept.ours / kept.peft)
    return [Row(f"{what}, {_named(kept.passes)}", kept.base, kept.peft, kept.ours, "PEFT", ratio, target, size)]


def _kept_by_adapters(what: str, kept: Kept) -> list[Row]:
    theirs, ours = kept.peft - kept.base, kept.ours - kept.base
    ratio = Ratio.exactly(ours / theirs)
    return [Row(f"{what}, {_named(kept.passes)}", None, theirs, ours, "PEFT", ratio, Target.at_most(0.30), size)]


def _kept(case: Size, dtype: torch.dtype, dropout: float, passes: Sequence[str]) -> Kept:
    base: Any = llama(case.hidden, case.layers).to(dtype)
    tokens = torch.randint(0, 256, case.tokens)
    theirs, ours = adapted(base, "PEFT", dropout).train(), _optimized(base, dropout, passes, tokens)
    embedded = base.get_input_embeddings()(tokens).detach().requires_grad_()
    return Kept(
        kept_bytes(lambda: base(inputs_embeds=embedded).logits.square().mean()),
        kept_bytes(lambda: loss_of(theirs, tokens)),
        kept_bytes(lambda: loss_of(ours, tokens)),
        passes,
    )
