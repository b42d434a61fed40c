"""RoAd beside others of its kind, in mixed batches, and on weights that PEFT doesn't adapt."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.modules import LinearNF4
from models import Experts
from oracle import LINEAR, Case, assert_close, moved, outputs
from quantised import by_bitsandbytes
from torch import nn

import graphpeft
from graphpeft import AdaptError, RoadConfig, get_peft_model
from graphpeft.sites import quantisers

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through")


def by_both(build: Any, **options: Any) -> tuple[Any, Any]:
    """Returns two copies of a model, adapted by PEFT and by this library, with equal values."""
    theirs = moved(peft.get_peft_model(build(), peft.RoadConfig(**options)))
    ours: Any = get_peft_model(build(), RoadConfig(**options))
    graphpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours.eval()


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_each_row_of_a_batch_has_pefts_rotations(variant: str):
    options: dict[str, Any] = {"variant": variant, "group_size": 4, "target_modules": ["0"]}
    others: dict[str, Any] = {"variant": variant, "group_size": 8, "target_modules": ["0"]}
    theirs, ours = by_both(LINEAR.build, **options)
    for model, config in ((theirs, peft.RoadConfig), (ours, RoadConfig)):
        model.add_adapter("second", config(**others))
    theirs.base_model.set_adapter(["default", "second"])
    moved(theirs)
    for name in ("default", "second"):
        values = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        graphpeft.set_peft_model_state_dict(ours, values, adapter_name=name)
    ours.set_adapter(["default", "second"])
    assert_close(outputs(ours, LINEAR), outputs(theirs, LINEAR), 1e-5)
    (x,) = LINEAR.inputs()
    names = ["second", "__base__", "default", "second"]
    with torch.no_grad():
        assert_close(ours(x, adapter_names=names), theirs(x, adapter_names=names), 1e-5)


def test_each_matrix_of_a_stack_has_rotations_of_its_own():
    config = RoadConfig(group_size=2, variant="road_2", target_modules=["up"])
    assert get_peft_model(Experts(), config).default.up_road_theta.shape == (2, 6)


@pytest.mark.filterwarnings("ignore:adapters are merged into the quantised weights")
def test_outputs_of_quantised_layers_are_rotated_and_merged_where_they_have_no_bias():
    options: dict[str, Any] = {"group_size": 16, "target_modules": ["0"]}
    for bias in (True, False):
        case = Case("nf4", by_bitsandbytes(LinearNF4, bias=bias), lambda: (torch.randn(3, 64),))
        base: Any = case.build()
        model: Any = moved(get_peft_model(case.build(), RoadConfig(**options)))
        plain: Any = nn.Sequential(nn.Linear(64, 64, bias=bias))
        plain[0].weight.data = quantisers.codes_of(base[0]).numbers()
        if bias:
            plain[0].bias.data = base[0].bias.data.float()
        same: Any = get_peft_model(plain, RoadConfig(**options))
        graphpeft.set_peft_model_state_dict(same, graphpeft.get_peft_model_state_dict(model))
        (x,) = case.inputs()
        expected = base[2](torch.tanh(same(x)))
        assert_close(model(x), expected, 1e-5)
        if bias:
            with pytest.raises(AdaptError, match="its bias would be rotated, too, and only codes"):
                model.merge_adapter()
            continue
        model.merge_adapter()
        merged = quantisers.codes_of(model[0]).numbers()
        numbers = same.merge_and_unload()[0].weight.detach()
        torch.testing.assert_close(merged, quantisers.quantised(base[0], numbers).numbers())


def test_features_that_do_not_fall_into_groups_are_refused():
    with pytest.raises(AdaptError, match="its 8 output features don't fall into groups of group_size=64"):
        get_peft_model(LINEAR.build(), RoadConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="group_size is 3, which has no two halves"):
        RoadConfig(group_size=3)


@pytest.mark.parametrize("groups", [4, 8])
def test_rotations_across_the_groups_of_a_convolution_act_and_are_not_merged(groups: int):
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, groups=groups)), torch.randn(2, 8, 5)
    base = layer(x)
    config = RoadConfig(group_size=4, target_modules=["0"], init_weights=False)
    model: Any = get_peft_model(layer, config).eval()
    expected = model(x)
    assert (expected - base).abs().max() > 0.1
    with pytest.raises(AdaptError, match="features has some of two groups of the convolution"):
        model.merge_and_unload()
    assert torch.equal(model(x), expected)


def test_rotations_within_the_groups_of_a_convolution_are_merged():
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, groups=2)), torch.randn(2, 8, 5)
    model: Any = get_peft_model(layer, RoadConfig(group_size=4, target_modules=["0"], init_weights=False)).eval()
    assert_close(model(x), model.merge_and_unload()(x), 1e-5)
