"""What passes make of a Llama's forward and training step, in time and in bytes that are kept for the backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from llama import Size, check_training, input_gradients, loss_of, sizes, training_step
from models import TARGETS, adapted, assert_close, copy_sharing_weights, llama
from timing import Ratio, Row, Target, calls, measure, size
from torch import Tensor, nn

import graphpeft
from graphpeft.testing.memory import kept_bytes

LAUNCHES = ("flattened_rows", "inplace_addmm")
TIME = ("inplace_addmm",)
GROUPED = ("grouped_products", "inplace_addmm")
MEMORY = ("regenerated_dropout", "recomputed_casts", "inplace_addmm")
RECOMPUTED = ("regenerated_dropout", "recomputed_casts", "grouped_products", "recomputed_inputs", "inplace_addmm")
DROPOUT = 0.05


def passes_time(rounds: int) -> list[Row]:
    """Times the forward and the training step, each with the passes that serve it best."""
    large, small = sizes()
    return [
        *_forward_rows(large, rounds, TIME),
        *_forward_rows(small, rounds, LAUNCHES),
        *_training_rows(large, rounds, 0.0, (TIME, GROUPED, RECOMPUTED), large.training_to_peft),
        *_training_rows(small, rounds, 0.0, (LAUNCHES,), small.training_to_peft),
        *_training_rows(large, rounds, DROPOUT, (TIME, MEMORY, RECOMPUTED), Target.at_most(0.95)),
    ]


def kept_for_backward(rounds: int) -> list[Row]:
    """Counts what is kept for the backward, which no round changes."""
    large, _ = sizes()
    single, half = llama(large.hidden, large.layers), llama(large.hidden, large.layers).bfloat16()
    tokens = torch.randint(0, 256, large.tokens)
    block = f"{large.name}: kept for the backward"
    return [
        _kept_row(f"{block}", single, tokens, 0.0, RECOMPUTED, Target.at_most(0.75)),
        _kept_row(f"{block}, dropout {DROPOUT}", single, tokens, DROPOUT, RECOMPUTED, Target.at_most(0.60)),
        _kept_row(f"{block}, bfloat16", half, tokens, 0.0, RECOMPUTED, None),
        _kept_by_adapters(f"{block} by the adapters alone, bfloat16", half, tokens, Target.at_most(0.30)),
    ]


def compiled_time(rounds: int) -> list[Row]:
    """Times the training step under ``torch.compile``, which must take each model whole."""
    base = llama(256, 2)
    tokens = torch.randint(0, 256, (2, 64))
    models = {"PEFT": adapted(base, "PEFT").train(), "graphpeft": _optimized(base, 0.0, TIME, tokens)}
    check_training(models, tokens, 0.0)
    steps = {}
    for name, model in models.items():
        torch.compiler.reset()
        steps[name] = calls(training_step(torch.compile(model, fullgraph=True), tokens))
        steps[name]()  # compiles
    samples = measure("training step, compiled", steps, rounds)
    what = "Llama 256 × 2, 2 × 64 tokens: training step, torch.compile(fullgraph=True)"
    ratio = Ratio.of(samples["graphpeft"], samples["PEFT"])
    return [Row(what, None, median(samples["PEFT"]), median(samples["graphpeft"]), "PEFT", ratio, Target.at_most(1.01))]


# time


def _forward_rows(case: Size, rounds: int, passes: Sequence[str]) -> list[Row]:
    base = llama(case.hidden, case.layers)
    tokens = torch.randint(0, 256, case.tokens)
    models = {"base": base, "PEFT": adapted(base, "PEFT"), "ours": _optimized(base, 0.0, passes, tokens).eval()}
    with torch.no_grad():
        assert_close("forward", models["ours"](input_ids=tokens).logits, models["PEFT"](input_ids=tokens).logits)
        candidates = {name: calls(functools.partial(model, input_ids=tokens)) for name, model in models.items()}
        samples = measure(f"forward, {case.name}", candidates, rounds)
    what = f"{case.name}: forward, {', '.join(passes)}"
    times = [median(samples[name]) for name in ("base", "PEFT", "ours")]
    return [
        Row(what, *times, other, Ratio.of(samples["ours"], samples[other]), target)
        for other, target in (("PEFT", case.forward_to_peft), ("base", case.forward_to_base))
        if target is not None
    ]


def _training_rows(
    case: Size, rounds: int, dropout: float, variants: Sequence[Sequence[str]], target: Target | None
) -> list[Row]:
    base = llama(case.hidden, case.layers)
    tokens = torch.randint(0, 256, case.tokens)
    models = {"PEFT": adapted(base, "PEFT", dropout).train()}
    for passes in variants:
        models[_named(passes)] = _optimized(base, dropout, passes, tokens)
        check_training({"PEFT": models["PEFT"], "graphpeft": models[_named(passes)]}, tokens, dropout)
    samples = _training_samples(case, base, tokens, models, rounds)
    times = median(samples["base"]), median(samples["PEFT"])
    what = f"{case.name}: training step, " + (f"dropout {dropout}, " if dropout else "")
    return [
        Row(what + how, *times, median(samples[how]), "PEFT", Ratio.of(samples[how], samples["PEFT"]), target)
        for how in list(models)[1:]
    ]


def _training_samples(case: Size, base: nn.Module, tokens: Tensor, models: dict[str, Any], rounds: int) -> Any:
    steps = {"base": calls(input_gradients(base, tokens))}
    steps |= {name: calls(training_step(model, tokens)) for name, model in models.items()}
    return measure(f"training step with passes, {case.name}", steps, rounds)


def _named(passes: Sequence[str]) -> str:
    return ("traced, " if _needs_trace(passes) else "") + ", ".join(passes)


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


def _kept_row(
    what: str, base: nn.Module, tokens: Tensor, dropout: float, passes: Sequence[str], target: Target | None
) -> Row:
    without, theirs, ours = _kept(base, tokens, dropout, passes)
    return Row(f"{what}, {_named(passes)}", without, theirs, ours, "PEFT", _exactly(ours / theirs), target, size)


def _kept_by_adapters(what: str, base: nn.Module, tokens: Tensor, target: Target) -> Row:
    without, theirs, ours = _kept(base, tokens, 0.0, MEMORY)
    theirs, ours = theirs - without, ours - without
    return Row(f"{what}, {_named(MEMORY)}", None, theirs, ours, "PEFT", _exactly(ours / theirs), target, size)


def _kept(base: Any, tokens: Tensor, dropout: float, passes: Sequence[str]) -> tuple[int, int, int]:
    """Returns what the base keeps for the gradient of its input, and what PEFT and this library keep for a step."""
    theirs, ours = adapted(base, "PEFT", dropout).train(), _optimized(base, dropout, passes, tokens)
    embedded = base.get_input_embeddings()(tokens).detach().requires_grad_()
    return (
        kept_bytes(lambda: base(inputs_embeds=embedded).logits.square().mean()),
        kept_bytes(lambda: loss_of(theirs, tokens)),
        kept_bytes(lambda: loss_of(ours, tokens)),
    )


def _exactly(ratio: float) -> Ratio:
    return Ratio(ratio, ratio, ratio)
