"""LoKr on whole models, in training, on layers that PEFT doesn't adapt, and as plain LoRA."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from kinds import Dropping, Kernels
from models import LLAMA, call, result
from oracle import CONV_1D, LINEAR, by_both_libraries
from peft.tuners.lokr.layer import factorization
from peft.tuners.lora.conversion import convert_to_lora as convert_by_peft
from torch import nn

import graphpeft
from graphpeft import AdaptError, LoKrConfig, get_peft_model, get_peft_model_state_dict, own_weight
from graphpeft.methods.lokr import two_factors

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through", "ignore:Converting a PEFT")

DRAWN: dict[str, Any] = {"r": 1, "alpha": 3, "init_weights": False}


def drawn(**options: Any) -> LoKrConfig:
    return LoKrConfig(**{**DRAWN, **options})


def by_both(base: nn.Module, **options: Any) -> tuple[Any, Any]:
    return by_both_libraries(base, "LoKrConfig", {**DRAWN, **options})


def test_sizes_are_parted_as_in_peft():
    for factor in (-1, 0, 1, 2, 3, 5, 8, 12, 40, 1000):
        for size in range(1, 200):
            assert two_factors(size, factor) == factorization(size, factor), (size, factor)


def test_patterns_decide_which_factors_are_products(tmp_path: Any):
    options = {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 20},
        "alpha_pattern": {"1.*q_proj": 7},
    }
    theirs, ours = by_both(LLAMA.build(), **options)
    names = {key.rpartition(".")[2] for key in get_peft_model_state_dict(ours) if "v_proj" in key}
    assert names == {"lokr_w1", "lokr_w2"}
    ours.save_pretrained(tmp_path)
    expected = result(call(theirs.eval(), LLAMA.inputs()))
    for library in (peft, graphpeft):
        loaded = library.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path)).eval()
        torch.testing.assert_close(result(call(loaded, LLAMA.inputs())), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_dropout": 0.6},
        {"module_dropout": 0.5},
        {"rank_dropout": 0.3, "rank_dropout_scale": True},
        {"rank_dropout": 0.3, "module_dropout": 0.4},
    ],
    ids=str,
)
def test_training_draws_the_random_numbers_that_pefts_draws(options: dict[str, Any]):
    torch.manual_seed(0)
    theirs, ours = by_both(Dropping(), target_modules=["0", "3", "4"], **options)
    x, found = torch.randn(2, 4, 5, 5), set()
    for seed in range(20):
        outputs = []
        for model in (theirs.train(), ours.train()):
            torch.manual_seed(seed)
            outputs.append(model(x))
        torch.testing.assert_close(outputs[1], outputs[0])
        found.add(outputs[1].sum().item())
    assert len(found) > 10


@pytest.mark.parametrize("options", [{}, {"decompose_both": True, "decompose_factor": 4}, {"r": 9}], ids=str)
def test_gradients_of_a_step_are_pefts(options: dict[str, Any]):
    torch.manual_seed(0)
    theirs, ours = by_both(Dropping(), target_modules=["0", "3", "4"], rank_dropout=0.3, **options)
    gradients, x = [], torch.randn(2, 4, 5, 5)
    for library, model in ((peft, theirs), (graphpeft, ours)):
        torch.manual_seed(5)
        model.train()(x).square().sum().backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        gradients.append(dict(zip(library.get_peft_model_state_dict(model), found, strict=True)))
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


def test_a_core_of_one_dimension_works_where_peft_crashes():
    # where W₁ has more than one row: torch.kron has no contiguous view of what PEFT gives it
    theirs, ours = by_both(CONV_1D.build(), target_modules=["0"], use_effective_conv2d=True)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        theirs(*CONV_1D.inputs())
    adapter: Any = ours[0].default
    second = torch.einsum("ijk,ip,jn->pnk", adapter.lokr_t2[..., 0], adapter.lokr_w2_a, adapter.lokr_w2_b)
    change = torch.stack([torch.kron(adapter.lokr_w1, position) for position in second.unbind(-1)], -1) * 3
    (x,) = CONV_1D.inputs()
    plain = CONV_1D.build().get_submodule("0")
    torch.testing.assert_close(ours(x), torch.tanh(plain(x) + nn.functional.conv1d(x, change, padding=1)))


def test_each_expert_has_factors_of_its_own():
    torch.manual_seed(0)
    model: Any = get_peft_model(Kernels(), drawn(target_modules=["experts"], r=9, decompose_factor=5))
    first, second = model.default.experts_lokr_w1, model.default.experts_lokr_w2
    before = own_weight(model, "experts").detach().clone()
    assert (first.shape, second.shape) == ((2, 5, 1), (2, 1, 7))
    model.merge_adapter()
    for number in range(2):
        change = torch.kron(first[number], second[number]) * (3 / 9)
        torch.testing.assert_close(model.experts[number], before[number] + change)


@pytest.mark.parametrize("options", [{}, {"use_effective_conv2d": True, "decompose_factor": 1}, {"r": 9}], ids=str)
def test_weights_of_groups_are_pefts_active_and_merged(options: dict[str, Any]):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv2d(12, 8, 3, groups=2)), torch.randn(2, 12, 5, 5)
    theirs, ours = by_both(base, target_modules=["0"], **options)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.merge_and_unload()(x), theirs(x))


def test_beside_half_precision_the_change_is_pefts_bit_for_bit():
    (x,) = LINEAR.inputs()
    theirs, ours = by_both(LINEAR.build().bfloat16(), target_modules=["0"])
    assert torch.equal(ours(x.bfloat16()), theirs(x.bfloat16()))


@pytest.mark.parametrize("rank", [2, 1.0])
def test_it_is_converted_to_the_lora_that_peft_makes_of_it(rank: float):
    theirs, ours = by_both(LINEAR.build(), target_modules=["0"], r=4)
    _, expected = convert_by_peft(theirs, rank)
    _, found = graphpeft.convert_to_lora(ours, rank)
    assert found.keys() == expected.keys()
    A, B = (f"base_model.model.0.lora_{name}.weight" for name in "AB")
    torch.testing.assert_close(found[B] @ found[A], expected[B] @ expected[A])


def test_a_combination_is_refused_since_it_is_no_such_product():
    model: Any = get_peft_model(LINEAR.build(), LoKrConfig(target_modules=["0"]))
    model.add_adapter("second", LoKrConfig(target_modules=["0"]))
    with pytest.raises(AdaptError, match="LOKR has no way to combine adapters"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"decompose_factor": -2}, "decompose_factor must be a whole number from -1 on"),
        ({"init_weights": "gaussian"}, "init_weights must be bool"),
        ({"rank_dropout": 2.0}, "rank_dropout must be a probability"),
    ],
)
def test_values_that_can_not_be_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        LoKrConfig(**options)
