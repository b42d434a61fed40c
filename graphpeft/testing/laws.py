"""The laws of adapted and traced models, as checks that raise with their findings.

Each law takes a function that builds the model (equal at each call), and inputs: a tuple of positional or a dict of
keyword arguments. The laws are numbered as in ``docs/architecture.md``.
"""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.state import Adapter
from graphpeft.graph.errors import GuardError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.paths import join
from graphpeft.model.adapt import explain, get_peft_model
from graphpeft.model.peft_model import PeftModel
from graphpeft.model.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict
from graphpeft.rules.config import PeftConfig
from graphpeft.testing.alike import require_alike, require_one_alike
from graphpeft.testing.blame import Build, blames_a_site, describe
from graphpeft.testing.by_hand import with_deltas
from graphpeft.testing.comparing import ROUNDING, LawError, require_close, require_equal
from graphpeft.testing.failing import RuleError, with_failing_rules
from graphpeft.testing.first_difference import first_difference
from graphpeft.testing.merging import require_no_merge, require_read_as_merged, require_unmerged_exactly
from graphpeft.testing.reference import Reference, require_reference
from graphpeft.testing.runs import (
    accepted,
    dead_tensors,
    differentiable,
    draw_otherwise,
    left_by,
    loss_of,
    perturbed,
    requiring_grad,
    run,
    run_copy,
)
from graphpeft.testing.snapshots import require_unchanged, require_unloaded, snapshot, with_saved
from graphpeft.testing.steady import require_steady
from graphpeft.testing.variants import of_sites_that_merge
from graphpeft.tracing.trace import trace
from graphpeft.wording import joined

BOTH_MODES = (False, True)
"""Evaluation and training."""

Tracer = Callable[[nn.Module, ExampleInputs], Any]
"""A function that traces a model, such as `graphpeft.trace`."""


@blames_a_site
def assert_fresh_adapter_changes_no_output(
    build: Build,
    config: PeftConfig,
    inputs: ExampleInputs,
    modes: Sequence[bool] | None = None,
    others: Sequence[ExampleInputs] = (),
) -> None:
    """Law 1: an adapter that starts as the identity changes no output, with gradients or without.

    Outputs are equal bit for bit, unless the config starts as the identity only within rounding, or the model has half
    precision, where DoRA rounds as PEFT does.

    PyTorch chooses some layers' kernels by requires_grad, as the fast path of `nn.MultiheadAttention`. So the base has
    frozen weights, as an adapted model has. A changed weight that code reads requires grad where gradients are
    recorded, as a table with trained rows does; so the adapted weights of the base may, too, as those that the adapter
    trains copies of.

    Args:
        build: Builds the model.
        config: The adapter's config.
        inputs: Inputs of the model.
        modes: The modes to check: evaluation (False), training (True) or both. None skips training if the adapter draws
            random numbers there, since the rest of the model then draws other numbers than without the adapter.
        others: Other inputs; those that a guard refuses are left out.

    Raises:
        LawError: If an output differs.
    """
    for mode in BOTH_MODES if modes is None else modes:
        base = build().train(mode)
        is_half = any(tensor.dtype in ROUNDING for tensor in base.parameters())
        tolerance = 1e-5 if is_half or config.starts_as_identity == "within rounding" else 0.0
        adapted = get_peft_model(build().train(mode), config, example_inputs=inputs)
        every = accepted(inputs, others, adapted)
        adapter = adapted._peft_adapters.by_name["default"]
        copied = [join(path, name) for path, names in adapter.fully_trained.items() for name in names]
        changed = [*[one.site.weight for one in adapter.weight_sites], *[join(path, "weight") for path in adapter.rows]]
        bases = [requiring_grad(base, paths) for paths in (copied, (*copied, *changed))]
        for records in (False, True):
            when = f"with training={mode}, {'gradients' if records else 'no gradients'}"
            with torch.set_grad_enabled(records):
                if modes is None and mode and draw_otherwise(adapted, base, inputs):
                    return
                with_it, *without = (functools.partial(run_copy, model, every) for model in (adapted, *bases))
                require_one_alike(with_it, without, tolerance, f"{when}, a fresh adapter changes the output")


@blames_a_site
def assert_only_the_adapter_is_trained(build: Build, config: PeftConfig, inputs: ExampleInputs) -> None:
    """Law 2: exactly the adapter's tensors require grad, and each of them gets a gradient from a training step.

    A gradient of zeros is none. A fresh adapter's may be zero as long as others have changed, but not for ever,
    as those of two factors that are both zero. A ReLU may be dead for some first values, so several are drawn.

    Args:
        build: Builds the model.
        config: The adapter's config.
        inputs: Inputs of the model.

    Raises:
        LawError: With the parameter that breaks the law.
    """
    model = build().train()
    frozen = {path for path, _ in model.named_parameters()}
    adapted = get_peft_model(model, config, example_inputs=inputs)
    frozen |= {join(*name) for name in adapted._peft_adapters.by_name["default"].frozen_names("default")}
    dead = dead_tensors(adapted, inputs, build, config)
    for reason in dead.values():
        tensors = joined([tensor for tensor in dead if dead[tensor] == reason])
        raise LawError(f"no gradient, or one of zeros, for {tensors}: {reason}")
    loss_of(run(perturbed(adapted), inputs)).backward()
    for path, parameter in adapted.named_parameters():
        if parameter.requires_grad == (path in frozen):
            raise LawError(f"{path} {'requires' if path in frozen else 'does not require'} grad")
        if parameter.requires_grad and parameter.grad is None:
            raise LawError(f"{path} gets no gradient")
        if not parameter.requires_grad and parameter.grad is not None:
            raise LawError(f"{path} gets a gradient, though it is frozen")


@blames_a_site
def assert_adapted_is_base_with_delta(
    build: Build,
    config: PeftConfig,
    inputs: ExampleInputs,
    modes: Sequence[bool] | None = None,
    tolerance: float = 1e-4,
    others: Sequence[ExampleInputs] = (),
    reference: Reference | None = None,
) -> None:
    """Law 3: adapted = base with the deltas added by hand = merged; and `unload` restores the base exactly.

    Weights that are read while the adapter acts are the merged ones.

    In evaluation, an adapted model is a function of its inputs, row by row, as far as the base is; with a reference, it
    is this function. Active adapters leave their copies of `modules_to_save`.

    An adapter that can't be merged must refuse to be merged, and only `unload` is checked. If some of its sites can be
    merged, the whole law is checked for an adapter of only these sites.

    Args:
        build: Builds the model.
        config: The adapter's config.
        inputs: Inputs of the model.
        modes: As for law 1.
        tolerance: The allowed difference of outputs, as for `require_close`.
        others: Other inputs; those that a guard refuses are left out.
        reference: The method's equation, see `Reference`.

    Raises:
        LawError: If an output differs, or `unload` leaves something.
    """
    chosen = BOTH_MODES if modes is None else modes
    if False in chosen:
        _evaluation_is_a_function(build, config, inputs, tolerance, others, reference)
    adapter, *_ = [
        _adapted_is_base_with_delta(build, config, inputs, others, mode, modes is None, tolerance) for mode in chosen
    ]
    narrowed = of_sites_that_merge(adapter, build, inputs)
    if narrowed is not None:
        for mode in chosen:
            _adapted_is_base_with_delta(build, narrowed, inputs, others, mode, modes is None, tolerance)


def _evaluation_is_a_function(
    build: Build,
    config: PeftConfig,
    inputs: ExampleInputs,
    tolerance: float,
    others: Sequence[ExampleInputs],
    reference: Reference | None,
) -> None:
    base = build().eval().requires_grad_(False)
    adapted = perturbed(get_peft_model(build().eval(), config, example_inputs=inputs))
    require_steady(adapted, base, inputs, tolerance)
    if reference is not None:
        require_reference(adapted, base, accepted(inputs, others, adapted), reference, tolerance)


def _adapted_is_base_with_delta(
    build: Build,
    config: PeftConfig,
    inputs: ExampleInputs,
    others: Sequence[ExampleInputs],
    mode: bool,
    may_draw: bool,
    tolerance: float,
) -> Adapter:
    """Checks the third law in one mode, and returns the adapter."""
    untouched = build().train(mode)
    adapted = perturbed(get_peft_model(build().train(mode), config, example_inputs=inputs))
    adapter = adapted._peft_adapters.by_name["default"]
    every = accepted(inputs, others, adapted)
    if may_draw and mode and draw_otherwise(adapted, untouched, inputs):
        return adapter
    if adapter.coded_sites:
        require_unmerged_exactly(adapted, inputs)
    elif adapter.changes_weights:
        active = functools.partial(run_copy, adapted, every)
        merged = functools.partial(run_copy, adapted, every, lambda copied: copied.merge_and_unload())
        add_deltas = functools.partial(with_deltas, adapter=adapter, modules=dict(adapted.named_modules()))
        base = functools.partial(run_copy, untouched, every)
        by_hand = functools.partial(base, add_deltas)
        # it refuses a tied weight, where a delta added by hand would change the other layer, too
        require_read_as_merged(adapted, copy.deepcopy(adapted).merge_and_unload(), adapter, tolerance)
        require_alike(by_hand, active, tolerance, f"training={mode}: adapted isn't base with deltas", base)
        require_alike(merged, active, tolerance, f"training={mode}: merged differs from adapted", base)
    else:
        require_no_merge(adapted)
    left = with_saved(untouched, adapted)
    require_unloaded(adapted.unload(), left, inputs)
    return adapter


@blames_a_site
def assert_saved_is_loaded(
    build: Build, config: PeftConfig, inputs: ExampleInputs, others: Sequence[ExampleInputs] = ()
) -> None:
    """Law 4: an adapter that is saved and loaded has the same outputs and the same tensors.

    Args:
        build: Builds the model.
        config: The adapter's config.
        inputs: Inputs of the model.
        others: Other inputs; those that a guard refuses are left out.

    Raises:
        LawError: If a tensor or an output differs.
    """
    adapted = perturbed(get_peft_model(build().eval(), config, example_inputs=inputs))
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        trained_on = PeftModel.from_pretrained(build(), folder, is_trainable=True, example_inputs=inputs).eval()
        loaded = PeftModel.from_pretrained(build(), folder, example_inputs=inputs)
    require_equal(dict(trained_on.named_parameters()), dict(adapted.named_parameters()), "loaded parameters differ")
    require_close(_file_of(trained_on), _file_of(adapted), 1e-6, "what is saved again differs")
    every = accepted(inputs, others, adapted)
    saved = functools.partial(run_copy, adapted, every)
    for what, again in (("what is loaded for training", trained_on), ("loaded", loaded)):
        require_alike(functools.partial(run_copy, again, every), saved, 1e-6, f"{what} differs from saved")


@blames_a_site
def assert_traced_is_adapted_alike(
    build: Build,
    config: PeftConfig,
    inputs: ExampleInputs,
    tracer: Tracer = trace,
    others: Sequence[ExampleInputs] = (),
) -> None:
    """Law 5: the model and its flat graph have the same sites, the same tensors in the file, and the same outputs.

    Args:
        build: Builds the model.
        config: The adapter's config.
        inputs: Inputs of the model.
        tracer: Traces a model, given its inputs.
        others: Other inputs; those that a guard of the trace refuses are left out.

    Raises:
        LawError: If a tensor or an output differs.
        TraceError: If the model can't be traced.
    """
    model = perturbed(get_peft_model(build().eval(), config, example_inputs=inputs))
    traced = get_peft_model(tracer(build().eval(), inputs), config)
    set_peft_model_state_dict(traced, _file_of(model))
    require_equal(_file_of(traced), _file_of(model), "the traced model's file differs")
    for mode in BOTH_MODES:
        models = traced.train(mode), model.train(mode)
        every = accepted(inputs, others, *models)
        found, expected = (functools.partial(run_copy, each, every) for each in models)
        require_alike(found, expected, 1e-6, f"training={mode}: the traced model's outputs differ")


def assert_spellings_are_adapted_alike(
    build: Build, others: Sequence[Build], config: PeftConfig, inputs: ExampleInputs
) -> None:
    """Law 5: models that spell one computation in several ways have the same sites, files and outputs.

    Args:
        build: Builds one of the models.
        others: Build the other models, with equal tensors.
        config: The adapter's config.
        inputs: Inputs of the models.

    Raises:
        LawError: If a site, a tensor or an output differs.
    """
    model = perturbed(get_peft_model(build().eval(), config, example_inputs=inputs))
    sites = [(site.site.name, site.site.shape) for site in model.adapter_report().adapted]
    for build_other in others:
        other = get_peft_model(build_other().eval(), config, example_inputs=inputs)
        if sites != [(site.site.name, site.site.shape) for site in other.adapter_report().adapted]:
            raise LawError(f"sites differ: {sites} and those of\n{other.adapter_report()}")
        # raises if the files differ
        set_peft_model_state_dict(other, _file_of(model))
        try:
            found, expected = (functools.partial(run_copy, each, [inputs]) for each in (other, model))
            require_alike(found, expected, 1e-5, "another spelling's outputs differ")
        except LawError as error:
            described = [describe(site, other, config.method) for site in other.adapter_report().adapted]
            raise LawError("\n".join([str(error), *described])) from error


@blames_a_site
def assert_dry_runs_change_nothing(build: Build, config: PeftConfig, inputs: ExampleInputs) -> None:
    """Law 6: `explain` and a failed adaptation change nothing.

    Args:
        build: Builds the model.
        config: The adapter's config.
        inputs: Inputs of the model.

    Raises:
        LawError: With the first change.
    """
    model = build()
    before = snapshot(model)
    report = explain(model, config, example_inputs=inputs)
    require_unchanged(model, before, "explain")
    if not report.adapted:
        return  # no rule can fail
    try:
        get_peft_model(model, with_failing_rules(config), example_inputs=inputs)
    except RuleError:
        require_unchanged(model, before, "a failed adaptation")
    else:
        raise LawError("an adaptation whose rule fails didn't fail")


def assert_traced_is_the_model(
    build: Build,
    inputs: ExampleInputs,
    *others: ExampleInputs,
    may_refuse: bool = False,
    modes: Sequence[bool] = BOTH_MODES,
    tracer: Tracer = trace,
) -> None:
    """Law 7: tracing changes nothing, and the graph equals the model in both modes and on other inputs.

    The model and its graph run several times without being built anew, so that each run starts from the last one's
    state.

    Args:
        build: Builds the model.
        inputs: The example inputs.
        others: Other inputs.
        may_refuse: Whether the model branches on its inputs, so that a guard may refuse other inputs.
        modes: The modes to trace in: evaluation (False), training (True) or both.
        tracer: Traces a model, given its inputs.

    Raises:
        LawError: If tracing changes the model, or an output differs; with the nodes that compute the output.
        TraceError: If the model can't be traced.
        GuardError: If the graph refuses the example inputs, or others without `may_refuse`.
    """
    for training in modes:
        model = build().train(training)
        before = snapshot(model)
        traced = tracer(model, inputs)
        require_unchanged(model, before, "tracing")
        original = build()
        for given, mode in itertools.product((inputs, *others), (training, not training)):
            expected = run(original.train(mode), given)
            try:
                found = run(traced.train(mode), given)
            except GuardError:
                if may_refuse and given is not inputs:
                    # the refused run may have written into buffers
                    original, traced = build(), tracer(build().train(training), inputs)
                    continue
                raise
            law = f"traced with training={training}, run with training={mode}"
            try:
                require_equal(found, expected, law)
            except LawError as error:
                models = build().train(mode), tracer(build().train(training), inputs).train(mode)
                where = first_difference(*models, given)
                raise LawError(f"{error}\n{where}") from error


def assert_traced_trains_as_the_model(
    build: Build,
    inputs: ExampleInputs,
    *others: ExampleInputs,
    may_refuse: bool = False,
    modes: Sequence[bool] = BOTH_MODES,
    strict: bool = False,
    tracer: Callable[..., Any] = trace,
) -> None:
    """Law 7 for all results and effects of a run: outputs, gradients, and writes into buffers and inputs.

    The model and its graph run several times without being built anew, so that each run starts from the last one's
    state.

    Args:
        build: Builds the model.
        inputs: The example inputs.
        others: Other inputs.
        may_refuse: Whether the model branches on its inputs or its mode, so that a guard may refuse others.
        modes: The modes to trace in: evaluation (False), training (True) or both.
        strict: Whether all modules must become nodes.
        tracer: Traces a model, given its inputs and `strict`.

    Raises:
        LawError: If a result or an effect differs.
        TraceError: If the model can't be traced.
        GuardError: If the graph refuses the example inputs, or others without `may_refuse`.
    """
    for training in modes:
        original, model = (build().train(training) for _ in range(2))
        before = snapshot(model)
        traced = tracer(model, differentiable(inputs)[1], strict=strict)
        require_unchanged(model, before, "tracing")
        for given, mode in itertools.product((inputs, *others), (training, not training)):
            expected = left_by(original.train(mode), original, given)
            try:
                found = left_by(traced.train(mode), model, given)
            except GuardError:
                if may_refuse and (given is not inputs or mode != training):
                    return  # the refused run may have written into buffers
                raise
            for what, value in expected.items():
                law = f"traced with training={training}, run with training={mode}: {what}"
                require_equal(found[what], value, law)


def _file_of(adapted: nn.Module) -> dict[str, torch.Tensor]:
    return dict(sorted(get_peft_model_state_dict(adapted).items()))
