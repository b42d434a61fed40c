"""The laws hold for generated models and configs, for every registered method."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from models import GPT2, LLAMA, Example
from programs import ProgramCase, program_cases
from torch import nn

from graphpeft import (
    AdaptError,
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    LoraPerCallConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    TaskType,
    TraceError,
    trace,
)
from graphpeft.rules.plain_values import plain
from graphpeft.rules.registry import registered
from graphpeft.testing import assert_copies_stay_adapted, assert_two_adapters_act_together, laws
from graphpeft.testing.edits import assert_edits_can_be_undone, edits
from graphpeft.testing.generated_models import DIM, SPELLINGS, Case, Functional, Model, cases, in_dtype, tied_cases
from graphpeft.testing.strategies import METHODS, Method, adaptations

# a few for each method, since test_every_rule.py and test_contracts.py hold the laws for chosen layers
some = settings(max_examples=settings().max_examples // 8)

every_method = pytest.mark.parametrize("method", METHODS, ids=plain)


def every_method_that(holds: Callable[[Method], bool]) -> pytest.MarkDecorator:
    chosen = [method for method in METHODS if holds(METHODS[method])]
    return pytest.mark.parametrize("method", chosen, ids=plain)


IN_FRONT: dict[PeftType, PeftConfig] = {
    PeftType.ADAPTION_PROMPT: AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
    PeftType.CARTRIDGE: CartridgeConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    PeftType.PREFIX_TUNING: PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
    PeftType.MULTITASK_PROMPT_TUNING: MultitaskPromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3, num_tasks=2
    ),
    PeftType.CPT: CPTConfig(task_type=TaskType.CAUSAL_LM, cpt_token_ids=[5, 6], cpt_tokens_type_mask=[1, 3]),
}
"""Configs of the methods that only Transformers models take."""


@pytest.mark.parametrize("method", IN_FRONT, ids=plain)
@pytest.mark.parametrize("example", [LLAMA, GPT2], ids=str)
def test_the_laws_hold_for_what_only_transformers_models_take(method: PeftType, example: Example) -> None:
    inputs: dict[str, Any]
    config, inputs = IN_FRONT[method], {"input_ids": torch.randint(3, 60, (2, 5)), "use_cache": False}
    if method is PeftType.MULTITASK_PROMPT_TUNING:
        inputs["task_ids"] = torch.tensor([1, 0])
    is_first = (laws.assert_fresh_adapter_changes_no_output,) if config.starts_as_identity else ()
    for law in (
        *is_first,
        laws.assert_only_the_adapter_is_trained,
        laws.assert_adapted_is_base_with_delta,
        laws.assert_saved_is_loaded,
        laws.assert_dry_runs_change_nothing,
        assert_copies_stay_adapted,
        assert_two_adapters_act_together,
    ):
        fills_caches = method in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
        is_refused = law is assert_two_adapters_act_together and fills_caches
        with pytest.raises(AdaptError, match="can't act behind") if is_refused else contextlib.nullcontext():
            law(example.build, config, inputs)
        with pytest.raises(AdaptError, match="can't act behind") if is_refused else contextlib.nullcontext():
            law(lambda: example.build().bfloat16(), config, inputs)


X = torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(0))

STORED_AS_IN_OUT = ["x @ w", "w.mT.mT", "einsum transposed", "addmm"]
SAME_COMPUTATION = [sorted(SPELLINGS.keys() - set(STORED_AS_IN_OUT)), STORED_AS_IN_OUT]


def test_every_registered_method_is_tested():
    ours = {name for name, cls in registered().items() if cls.__module__.startswith("graphpeft.")}
    # test_per_call.py, test_poly.py, test_shadow.py, test_xlora.py
    elsewhere = {LoraPerCallConfig.peft_type, PeftType.POLY, PeftType.SHADOW, PeftType.XLORA}
    assert set(METHODS) | set(IN_FRONT) | elsewhere == ours


def test_methods_have_the_names_of_pefts():
    assert {method.value for method in PeftType} == {method.value for method in peft.PeftType}


@every_method_that(lambda method: method.is_identity)
@some
@given(data=st.data())
def test_a_fresh_adapter_changes_no_output(method, data):
    case, config = data.draw(adaptations(method, identity=True))
    laws.assert_fresh_adapter_changes_no_output(case.build, config, case.inputs)


@every_method
@some
@given(data=st.data())
def test_exactly_the_adapter_is_trained(method, data):
    case, config = data.draw(adaptations(method))
    laws.assert_only_the_adapter_is_trained(case.build, config, case.inputs)


@every_method
@some
@given(data=st.data())
def test_adapted_is_base_with_delta_and_unload_restores(method, data):
    case, config = data.draw(adaptations(method))
    laws.assert_adapted_is_base_with_delta(case.build, config, case.inputs)


@pytest.mark.filterwarnings("ignore:lora_dropout=.* is saved as 0")
@every_method
@some
@given(data=st.data())
def test_saved_is_loaded(method, data):
    case, config = data.draw(adaptations(method))
    laws.assert_saved_is_loaded(case.build, config, case.inputs)


@every_method
@some
@given(data=st.data())
def test_dry_runs_and_failures_change_nothing(method, data):
    case, config = data.draw(adaptations(method))
    laws.assert_dry_runs_change_nothing(case.build, config, case.inputs)


@every_method
@some
@given(data=st.data())
def test_edits_can_be_undone(method, data):
    case = data.draw(METHODS[method].fits())
    made = data.draw(edits(METHODS[method].configs(case.build(), identity=False)))
    assert_edits_can_be_undone(case.build, made, case.inputs)


@given(case=cases())
def test_a_traced_model_is_the_model(case: Case):
    laws.assert_traced_is_the_model(case.build, case.inputs, *case.others)


@given(case=program_cases())
def test_a_traced_program_trains_as_the_program(case: ProgramCase):
    inputs, *others = case.inputs
    # whatever it isn't known to refuse, the tracer records, with all modules inside
    strict = not case.may_be_refused
    try:
        laws.assert_traced_trains_as_the_model(
            case.build, inputs, *others, may_refuse=True, modes=(case.training,), strict=strict
        )
    except TraceError:
        event("refused")
        if strict:
            raise


@every_method
@some
@given(data=st.data())
def test_copies_stay_adapted(method, data):
    case, config = data.draw(adaptations(method))
    assert_copies_stay_adapted(case.build, config, case.inputs)


@every_method
@some
@given(data=st.data())
def test_a_traced_model_is_adapted_as_the_model_is(method, data):
    case, config = data.draw(adaptations(method))
    laws.assert_traced_is_adapted_alike(case.build, config, case.inputs)


@every_method_that(lambda method: method.merges)
@some
@given(data=st.data())
def test_a_traced_model_with_tied_weights_is_adapted_as_the_model_is(method, data):
    case = data.draw(tied_cases())
    laws.assert_traced_is_adapted_alike(
        case.build, data.draw(METHODS[method].configs(case.build(), identity=False)), case.inputs
    )


@functools.cache
def spelled(spelling: str, bias: bool, as_graph: bool) -> nn.Module:
    """Returns a model with a weight in an operation that is spelled so, with equal tensors for all spellings."""
    torch.manual_seed(0)
    model = Model(Functional(spelling, bias), "alone")
    return trace(model, (X,)) if as_graph else model


@every_method_that(lambda method: method.merges)
@some
@given(data=st.data(), bias=st.booleans(), as_graph=st.booleans())
@pytest.mark.parametrize("spellings", SAME_COMPUTATION, ids=["stored as (out, in)", "stored as (in, out)"])
def test_every_spelling_is_adapted_alike(method, data, spellings, bias, as_graph):
    first, *others = [lambda spelling=each: copy.deepcopy(spelled(spelling, bias, as_graph)) for each in spellings]
    config = data.draw(METHODS[method].configs(first(), identity=False))
    laws.assert_spellings_are_adapted_alike(first, others, config, (X,))


@every_method
@some
@given(data=st.data())
def test_two_adapters_of_one_method_act_together(method, data):
    case, config = data.draw(adaptations(method))
    other = data.draw(METHODS[method].configs(case.build(), identity=False))
    # which all adapters of a model have in common
    common = {name: getattr(config, name) for name in ("save_projection",) if hasattr(config, name)}
    try:
        assert_two_adapters_act_together(case.build, config, case.inputs, dataclasses.replace(other, **common))
    except AdaptError as error:
        event("refused")
        if "only one of them can be active" not in str(error):
            raise


@given(case=cases())
@some
def test_a_traced_model_is_the_model_in_bfloat16(case: Case):
    half = in_dtype(case, torch.bfloat16)
    laws.assert_traced_is_the_model(half.build, half.inputs, *half.others)


def test_numbers_that_are_not_finite_are_equal_to_themselves():
    inf, nan = float("inf"), float("nan")
    laws.require_equal(torch.tensor([inf, nan, 1]), torch.tensor([inf, nan, 1]), "a law")
    for other in ([-inf, nan, 1], [inf, 0, 1]):
        with pytest.raises(laws.LawError):
            laws.require_equal(torch.tensor(other), torch.tensor([inf, nan, 1]), "a law")


def test_a_law_that_does_not_hold_raises():
    with pytest.raises(laws.LawError, match="by 1"):
        laws.require_close(torch.ones(2), torch.zeros(2), 0.5, "a law")
