"""What passes make of a Llama's forward and training step, in time and in bytes that are kept for the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from llama import Size, check_training, input_gradients, loss_of, sizes, training_step
from models import TARGETS, adapted, assert_close, copy_sharing_weights, llama
from timing import Ratio, Row, Target, calls, measure, size
from torch import Tensor, nn

import graphpeft

LAUNCHES = ("flattened_rows", "inplace_addmm")
TIME = ("inplace_addmm",)
GROUPED = ("grouped_products", "inplace_addmm")
MEMORY = ("regenerated_dropout", "recomputed_casts", "inplace_addmm")
DROPOUT = 0.05


def passes_time(rounds: int) -> list[Row]:
    """Times the forward and the training step, each with the passes that serve it best."""
    large, small = sizes()
    return [
        *_forward_rows(large, rounds, TIME),
        *_forward_rows(small, rounds, LAUNCHES),
        *_training_rows(large, rounds, {"": TIME, "traced, ": GROUPED}),
        *_training_rows(small, rounds, {"": LAUNCHES}),
        *_dropout_rows(large, rounds),
    ]


def kept_bytes(rounds: int) -> list[Row]:
    """Counts what is kept for the backward, which no round changes."""
    large, _ = sizes()
    single, half = llama(large.hidden, large.layers), llama(large.hidden, large.layers).bfloat16()
    tokens = torch.randint(0, 256, large.tokens)
    block = f"{large.name}: kept for the backward"
    return [
        _kept_row(f"{block}", single, tokens, 0.0, GROUPED, Target.at_most(0.75)),
        _kept_row(f"{block}, dropout {DROPOUT}", single, tokens, DROPOUT, MEMORY, Target.at_most(0.60)),
        _kept_row(f"{block}, bfloat16", half, tokens, 0.0, MEMORY, None),
        _kept_by_adapters(f"{block} by the adapters alone, bfloat16", half, tokens, Target.at_most(0.30)),
    ]


def compiled_time(rounds: int) -> list[Row]:
    """Times the training step under ``torch.compile``, which must take each model whole."""
    base = llama(256, 2)
    tokens = torch.randint(0, 256, (2, 64))
    models = {"PEFT": adapted(base, "PEFT").train(), "graphpeft": _optimized(base, 0.0, TIME)}
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
    models = {"base": base, "PEFT": adapted(base, "PEFT"), "ours": _optimized(base, 0.0, passes).eval()}
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


def _training_rows(case: Size, rounds: int, variants: dict[str, Sequence[str]]) -> list[Row]:
    base = llama(case.hidden, case.layers)
    tokens = torch.randint(0, 256, case.tokens)
    models = {"PEFT": adapted(base, "PEFT").train()}
    for how, passes in variants.items():
        models[how] = _optimized(base, 0.0, passes, tokens if how else None)
        check_training({"PEFT": models["PEFT"], "graphpeft": models[how]}, tokens, 0.0)
    samples = _training_samples(case, base, tokens, models, rounds)
    times = median(samples["base"]), median(samples["PEFT"])
    return [
        Row(
            f"{case.name}: training step, {how}{', '.join(passes)}",
            *times,
            median(samples[how]),
            "PEFT",
            Ratio.of(samples[how], samples["PEFT"]),
            case.training_to_peft,
        )
        for how, passes in variants.items()
    ]


def _dropout_rows(case: Size, rounds: int) -> list[Row]:
    base = llama(case.hidden, case.layers)
    tokens = torch.randint(0, 256, case.tokens)
    models = {"PEFT": adapted(base, "PEFT", DROPOUT).train()}
    models |= {", ".join(passes): _optimized(base, DROPOUT, passes) for passes in (TIME, MEMORY)}
    for model in models.values():
        check_training({"PEFT": models["PEFT"], "graphpeft": model}, tokens, DROPOUT)
    samples = _training_samples(case, base, tokens, models, rounds)
    times = median(samples["base"]), median(samples["PEFT"])
    return [
        Row(
            f"{case.name}: training step, dropout {DROPOUT}, {how}",
            *times,
            median(samples[how]),
            "PEFT",
            Ratio.of(samples[how], samples["PEFT"]),
            Target.at_most(0.95),
        )
        for how in list(models)[1:]
    ]


def _training_samples(case: Size, base: nn.Module, tokens: Tensor, models: dict[str, Any], rounds: int) -> Any:
    steps = {"base": calls(input_gradients(base, tokens))}
    steps |= {name: calls(training_step(model, tokens)) for name, model in models.items()}
    return measure(f"training step with passes, {case.name}", steps, rounds)


def _optimized(base: nn.Module, dropout: float, passes: Sequence[str], traced_with: Tensor | None = None) -> Any:
    """Returns an adapted copy of `base` in training, as a flat graph if it is traced, with passes."""
    model = adapted(base, "graphpeft", dropout)
    if traced_with is not None:
        state = graphpeft.get_peft_model_state_dict(model)
        config = graphpeft.LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS)
        model = graphpeft.trace(copy_sharing_weights(base).train(), {"input_ids": traced_with})
        model = graphpeft.get_peft_model(model, config)
        graphpeft.set_peft_model_state_dict(model, state)
    graphpeft.optimize(model, passes)
    return model.train()


# bytes


def _kept_row(
    what: str, base: nn.Module, tokens: Tensor, dropout: float, passes: Sequence[str], target: Target | None
) -> Row:
    without, theirs, ours = _kept(base, tokens, dropout, passes)
    return Row(f"{what}, {', '.join(passes)}", without, theirs, ours, "PEFT", _exactly(ours / theirs), target, size)


def _kept_by_adapters(what: str, base: nn.Module, tokens: Tensor, target: Target) -> Row:
    without, theirs, ours = _kept(base, tokens, 0.0, MEMORY)
    theirs, ours = theirs - without, ours - without
    return Row(f"{what}, {', '.join(MEMORY)}", None, theirs, ours, "PEFT", _exactly(ours / theirs), target, size)


def _kept(base: Any, tokens: Tensor, dropout: float, passes: Sequence[str]) -> tuple[int, int, int]:
    """Returns what the base keeps for the gradient of its input, and what PEFT and this library keep for a step."""
    traced_with = tokens if "grouped_products" in passes else None
    theirs, ours = adapted(base, "PEFT", dropout).train(), _optimized(base, dropout, passes, traced_with)
    embedded = base.get_input_embeddings()(tokens).detach().requires_grad_()
    return (
        kept_by(lambda: base(inputs_embeds=embedded).logits.square().mean(), base, embedded),
        kept_by(lambda: loss_of(theirs, tokens), theirs),
        kept_by(lambda: loss_of(ours, tokens), ours),
    )


def kept_by(run: Callable[[], Tensor], model: nn.Module, *given: Tensor) -> int:
    """Returns the bytes that `run` keeps for its backward: each memory once, without parameters and what is given."""
    aside = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *given)}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in aside:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = run()
    # until here all of it is there, so that no memory is another one's at the same place
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def _exactly(ratio: float) -> Ratio:
    return Ratio(ratio, ratio, ratio)
