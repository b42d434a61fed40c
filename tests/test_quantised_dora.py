"""DoRA on quantised layers is PEFT's, where PEFT has it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Case, assert_close, assert_files_go_both_ways, assert_trains_alike, by_us, config, outputs, tensors
from quantised import CASES, ours_of, theirs_of

import graphpeft
from graphpeft import explain, trace
from graphpeft.sites import quantisers
from graphpeft.testing import laws, verify

pytestmark = [
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:no gradient goes through a Linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:adapters are merged into the quantised weights:UserWarning"),
]

DORA: dict[str, Any] = {"use_dora": True}
# on a CPU, PEFT's loses the scales of int8 in the first call
WITH_ORACLE = [case for case in CASES if "bitsandbytes int8" not in case.name]
each_kind = pytest.mark.parametrize("case", CASES, ids=str)
with_oracle = pytest.mark.parametrize("case", WITH_ORACLE, ids=str)


def pair(case: Case, **options: Any) -> tuple[Any, Any]:
    ours, theirs = ours_of(case, **DORA, **options), theirs_of(case, **DORA, **options)
    graphpeft.set_peft_model_state_dict(ours, tensors(theirs))
    return ours, theirs


@each_kind
def test_a_fresh_adapter_is_the_identity(case: Case) -> None:
    tolerance = 1e-2 if "bfloat16" in case.name else 1e-6
    assert_close(outputs(by_us(case, **DORA), case), outputs(case.build(), case), tolerance)


@with_oracle
def test_it_computes_trains_and_is_filed_as_peft_does(case: Case, tmp_path: Path) -> None:
    for options in ({}, {"lora_dropout": 0.3}):
        ours, theirs = pair(case, **options)
        assert_close(outputs(ours, case), outputs(theirs, case), 1e-6)
        assert_trains_alike(ours, theirs, case, 1e-5)
    assert_files_go_both_ways(*pair(case), case, tmp_path, 1e-2 if "of inputs" in case.name else 1e-5)


@pytest.mark.parametrize("case", [case for case in WITH_ORACLE if "fp4" in case.name or "nf4" in case.name], ids=str)
def test_merged_is_what_peft_merges(case: Case) -> None:
    ours, theirs = pair(case)
    # PEFT rounds to half precision before it quantises
    tolerance = 0.1 if "bfloat16" in case.name else 1e-6
    assert_close(outputs(ours.merge_and_unload(), case), outputs(theirs.merge_and_unload(), case), tolerance)


@each_kind
def test_merged_into_numbers_it_is_the_formula_and_unmerged_it_is_exact(case: Case) -> None:
    ours = ours_of(case, **DORA)
    adapted, layer = outputs(ours, case), ours[0]
    W = quantisers.codes_of(layer).numbers().float()
    A, B, m = (layer.get_parameter(f"default.lora_{name}").detach() for name in ("A", "B", "magnitude"))
    changed = W + layer.default.lora_scaling * B @ A
    expected = m[:, None] * changed / changed.norm(dim=1, keepdim=True)
    ours.merge_adapter()
    ours.unmerge_adapter()
    assert torch.equal(outputs(ours, case), adapted)
    merged = copy.deepcopy(ours).merge_and_unload(dequantize=True)
    is_half = "bfloat16" in case.name
    assert_close(merged[0].weight.float(), expected, 1e-2 if is_half else 1e-6)
    rounds_inputs = "of inputs" in case.name or "bitsandbytes int8" in case.name
    assert_close(outputs(merged, case), adapted, 2e-2 if rounds_inputs or is_half else 1e-6)


@each_kind
def test_its_laws_hold(case: Case) -> None:
    found = verify(case.build(), config(case, **DORA, target_modules={"2"}), case.inputs(), progress=False, quiet=True)
    left_out = {"8 copies stay adapted"} if "torchao" in case.name or "4" in case.name else set()
    assert {verdict.law for verdict in found.verdicts if verdict.outcome == "fails"} <= left_out, found


@each_kind
def test_a_traced_model_and_rows_of_a_batch_have_it(case: Case) -> None:
    ours, traced = by_us(case, **DORA), trace(case.build(), case.inputs())
    torch.manual_seed(2)
    graphpeft.get_peft_model(traced, config(case, **DORA))
    for model in (ours, traced):
        laws.perturbed(model)
    assert torch.equal(outputs(traced, case), outputs(ours, case))
    (x,) = case.inputs()
    with torch.no_grad():
        mixed = ours(x, adapter_names=["default", "__base__", "default", "__base__"])
        with ours.disable_adapter():
            base = ours(x[1:2])
    assert_close(mixed[1:2], base, 2e-2)
    assert not torch.equal(mixed[0], outputs(case.build(), case)[0])


def test_without_the_numbers_it_is_refused_by_name() -> None:
    class Rounded(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__torch_function__(*args, **kwargs)

    layer = torch.nn.Linear(4, 4)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Rounded), requires_grad=False)
    report = explain(torch.nn.Sequential(layer), graphpeft.LoraConfig(target_modules=["0"], **DORA))
    assert "use_dora=True is for layers, and it is the call of a module" in report.refused[0].reason


@each_kind
def test_lengths_are_those_of_the_weight_without_what_is_merged(case: Case) -> None:
    model = ours_of(case)
    model.merge_adapter()
    merged = outputs(model, case)
    model.add_adapter("late", config(case, **DORA))
    expected = by_us(case, **DORA)[0].default.lora_magnitude
    assert_close(model[0].late.lora_magnitude, expected, 1e-6)
    assert torch.equal(outputs(model, case), merged)
