"""DoRA behind other adapters, in half precision, and on weights that PEFT doesn't adapt."""

from __future__ import annotations

import copy
import functools
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from models import FUNCTIONAL, GPT2, LLAMA, VIT
from oracle import (
    CONV_2D,
    CONVOLUTIONS,
    EMBEDDING,
    LINEAR,
    MATRICES,
    POINTWISE,
    Case,
    assert_close,
    assert_same_tensors,
    by_peft,
    by_us,
    config,
    outputs,
    peft_config,
    perturb,
    tensors,
)
from torch import Tensor, nn

import graphpeft
from graphpeft.testing import laws

# what PEFT warns of is PEFT's
pytestmark = pytest.mark.filterwarnings("ignore:::peft")

ALL = [*MATRICES, *CONVOLUTIONS, EMBEDDING, LLAMA, GPT2, VIT]
each = pytest.mark.parametrize("case", ALL, ids=str)


@each
def test_a_fresh_adapter_changes_no_output_bit_for_bit(case: Any) -> None:
    laws.assert_fresh_adapter_changes_no_output(case.build, config(case, use_dora=True), case.inputs())


@pytest.mark.parametrize("names", [("lora", "dora"), ("dora", "lora"), ("dora", "other")], ids=" before ".join)
@pytest.mark.parametrize("case", [*MATRICES, CONV_2D, EMBEDDING], ids=str)
def test_what_acts_before_is_scaled_with_the_weight_as_in_peft(case: Case, names: tuple[str, str]) -> None:
    theirs, ours = by_peft(case, use_dora=True), by_us(case, use_dora=True)
    for model, make in ((theirs, peft_config), (ours, config)):
        for name in names:
            model.add_adapter(name, make(case, use_dora=name != "lora"))
    for name in names:
        theirs.set_adapter(name)
        perturb(theirs)
        graphpeft.set_peft_model_state_dict(ours, _of(theirs, name), name)
    theirs.base_model.set_adapter(list(names))
    ours.set_adapter(list(names))
    assert_close(outputs(ours, case), outputs(theirs, case))
    expected = outputs(ours, case)
    assert_close(outputs(copy.deepcopy(ours).merge_and_unload(), case), expected)


def _of(model: Any, name: str) -> dict[str, Tensor]:
    return peft.get_peft_model_state_dict(model, adapter_name=name)


# what PEFT's doesn't adapt


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class BothWays(nn.Module):
    """A square matrix that is used as (out, in) and as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.w)) @ self.w


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eoi->bto", x, self.w)


BEYOND = [
    Case("attention", Attention, lambda: (torch.randn(2, 5, 8),), {"target_modules": ["attention.in_proj_weight"]}),
    Case("both-ways", BothWays, lambda: (torch.randn(2, 5, 8),), {"target_modules": ["w"]}),
    Case("experts", Experts, lambda: (torch.randn(2, 5, 8),), {"target_modules": ["w"]}),
    Case("transposed", lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2)), lambda: (torch.randn(2, 4, 5, 5),)),
    Case("unbatched", lambda: nn.Sequential(nn.Conv2d(4, 6, 3)), lambda: (torch.randn(4, 5, 5),)),
    Case("functional", FUNCTIONAL.make, FUNCTIONAL.inputs, FUNCTIONAL.own_lora or {}),
]


@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_the_laws_hold_where_peft_has_none(case: Case) -> None:
    adapter = config(case, use_dora=True)
    laws.assert_fresh_adapter_changes_no_output(case.build, adapter, case.inputs())
    laws.assert_only_the_adapter_is_trained(case.build, adapter, case.inputs())
    laws.assert_adapted_is_base_with_delta(case.build, adapter, case.inputs(), tolerance=1e-5)
    laws.assert_saved_is_loaded(case.build, adapter, case.inputs())


@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_a_fresh_change_is_zero_bit_for_bit(case: Case) -> None:
    merged = by_us(case, use_dora=True).merge_and_unload()
    assert all(torch.equal(tensor, case.build().state_dict()[name]) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("case", BEYOND[:3], ids=str)
def test_each_row_of_the_changed_weight_has_the_length_that_was_learnt(case: Case) -> None:
    model = by_us(case, use_dora=True)
    perturb(model)
    magnitude = next(tensor for name, tensor in tensors(model).items() if name.endswith("lora_magnitude_vector"))
    merged = model.merge_and_unload()
    weight = next(parameter for parameter in merged.parameters() if parameter.ndim > 1)
    assert_close(weight.norm(dim=-1), magnitude.abs())


def test_the_length_gets_no_gradient() -> None:
    model = by_us(LINEAR, use_dora=True)
    graph = model[0].graph
    assert any(node.target == "detach" for node in graph.nodes)


# half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*MATRICES, POINTWISE], ids=str)
def test_on_half_precision_weights_values_and_dtypes_are_pefts(case: Case, dtype: torch.dtype) -> None:
    half = case._replace(make=lambda: case.make().to(dtype), make_inputs=lambda: (case.make_inputs()[0].to(dtype),))
    ours, theirs = by_us(half, use_dora=True), by_peft(half, use_dora=True)
    assert {name: t.dtype for name, t in tensors(ours).items()} == {
        name: t.dtype for name, t in tensors(theirs).items()
    }
    assert_same_tensors(ours, theirs)
    perturb(theirs)
    graphpeft.set_peft_model_state_dict(ours, tensors(theirs))
    assert_close(outputs(ours, half).float(), outputs(theirs, half).float(), 1e-3)


# refusals


def refused(case: Any, *words: str, **options: Any) -> None:
    model = case.build()
    before = laws.snapshot(model)
    with pytest.raises(ValueError, match="(?s)" + ".*".join(words)):
        graphpeft.get_peft_model(model, config(case, **options))
    laws.require_unchanged(model, before, "a refused adaptation")


def test_groups_of_a_transposed_convolution_are_refused() -> None:
    layer = functools.partial(nn.ConvTranspose2d, 4, 6, 3, groups=2)
    grouped = Case("grouped", lambda: nn.Sequential(layer()), lambda: (torch.randn(1, 4, 5, 5),))
    refused(grouped, "2 groups", "transposed", use_dora=True)


def test_dora_with_what_peft_does_not_combine_with_it_is_refused() -> None:
    for options in ({"lora_bias": True}, {"init_lora_weights": "mica"}):
        with pytest.raises(ValueError, match="DoRA"):
            config(LINEAR, use_dora=True, **options)
