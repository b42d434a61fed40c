"""OFT where PEFT's is wrong, in training, and on layers that PEFT doesn't adapt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from models import Experts
from oracle import CONV_2D, EMBEDDING, LINEAR, POINTWISE, TRANSPOSED, Case, assert_close, moved
from peft.tuners.oft.layer import OFTLayer
from torch import nn

import graphpeft
from graphpeft import AdaptError, CheckpointError, OFTConfig, get_peft_model
from graphpeft.methods.rotations import nearest_divisor

pytestmark = pytest.mark.filterwarnings(
    "ignore:Invalid `oft_block_size`", "ignore:Invalid `r`", "ignore:no gradient goes through"
)
"""PEFT's own warnings, of what is meant here."""


def options(**others: Any) -> dict[str, Any]:
    """Returns options for blocks of three features of the first layer, and others."""
    return {"oft_block_size": 3, "target_modules": ["0"]} | others


def by_both(build: Callable[[], nn.Module], **others: Any) -> tuple[Any, Any]:
    """Returns two copies of a model, adapted by PEFT and by this library, with equal values."""
    theirs = moved(peft.get_peft_model(build(), peft.OFTConfig(**options(**others))))
    ours: Any = get_peft_model(build(), OFTConfig(**options(**others)))
    graphpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours.eval()


@pytest.mark.parametrize("features", [6, 7, 12, 36, 97])
def test_a_size_that_does_not_divide_the_features_becomes_the_divisor_that_pefts_becomes(features: int):
    wanted = range(1, features + 3)
    expected = [OFTLayer.adjust_oft_parameters(None, features, size) for size in wanted]  # type: ignore[arg-type]
    assert [nearest_divisor(features, size) for size in wanted] == expected


def test_blocks_of_one_feature_are_refused_since_nothing_would_be_trained():
    with pytest.raises(AdaptError, match="its features fall into blocks of one, which can't be rotated"):
        get_peft_model(nn.Sequential(nn.Linear(7, 3)), OFTConfig(oft_block_size=4, target_modules=["0"]))


@pytest.mark.parametrize("sizes", [{"r": 2}, {"r": 0, "oft_block_size": 0}], ids=str)
def test_the_number_of_blocks_or_their_size_is_given_and_not_both(sizes: dict[str, Any]):
    for library in (peft.OFTConfig, OFTConfig):
        with pytest.raises(ValueError, match="oft_block_size"):
            library(**sizes)


def test_kernels_over_several_positions_are_refused_where_pefts_fresh_adapter_changes_outputs():
    (x,), base = CONV_2D.inputs(), CONV_2D.build()
    theirs = peft.get_peft_model(CONV_2D.build(), peft.OFTConfig(**options()))
    assert (theirs(x) - base(x)).abs().max() > 0.1
    with pytest.raises(AdaptError, match="its kernel is 3×3: positions overlap, so that no rotation of its input is"):
        get_peft_model(base, OFTConfig(**options()))
    assert type(base.get_submodule("0")) is nn.Conv2d


def test_each_matrix_of_a_stack_has_rotations_of_its_own():
    torch.manual_seed(0)
    config = OFTConfig(r=1, oft_block_size=0, target_modules=["up"])
    assert get_peft_model(Experts(), config).default.up_oft_R.shape == (2, 1, 10)


def test_layers_that_transformers_stores_turned_are_rotated_as_linear_layers_are():
    base: Any = TRANSPOSED.build()
    linear = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    linear[0].load_state_dict({"weight": base[0].weight.T, "bias": base[0].bias})
    theirs, _ = by_both(lambda: copy.deepcopy(linear))
    model: Any = get_peft_model(base, OFTConfig(**options()))
    graphpeft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(theirs))
    (x,) = TRANSPOSED.inputs()
    assert_close(model(x), theirs(x))
    assert_close(model.merge_and_unload()(x), theirs(x))


def test_blocks_that_reach_over_groups_are_refused():
    base = nn.Sequential(nn.Conv2d(6, 4, 1, groups=2))
    with pytest.raises(AdaptError, match="blocks of 2 features don't fit into its 2 groups of 3"):
        get_peft_model(base, OFTConfig(oft_block_size=2, target_modules=["0"]))


@pytest.mark.parametrize("case", [LINEAR, POINTWISE, EMBEDDING], ids=str)
def test_constrained_rotations_are_trained_as_pefts(case: Case):
    build = case.build
    theirs, ours = by_both(build, coft=True, eps=0.4, oft_block_size=2)
    states = []
    for library, model in ((peft, theirs), (graphpeft, ours)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
        for _ in range(4):
            optimizer.zero_grad()
            model.train()(*case.inputs()).square().mean().backward()
            optimizer.step()
        states.append(library.get_peft_model_state_dict(model))  # type: ignore[attr-defined]
    for key, tensor in states[0].items():
        assert_close(states[1][key], tensor, 1e-5)
    assert_close(ours.eval()(*case.inputs()), theirs.eval()(*case.inputs()), 1e-5)


def test_evaluation_leaves_constrained_rotations_alone_and_has_their_gradients():
    model: Any = get_peft_model(LINEAR.build(), OFTConfig(**options(coft=True, eps=0.4))).eval()
    model(*LINEAR.inputs()).sum().backward()
    assert model[0].default.oft_R.grad.isfinite().all()
    before = moved(model)[0].default.oft_R.detach().clone()
    model(*LINEAR.inputs())
    assert torch.equal(model[0].default.oft_R, before)
    assert before.norm() > 0.4


def test_dropout_leaves_a_share_of_the_blocks_unrotated_in_training():
    model: Any = moved(get_peft_model(LINEAR.build(), OFTConfig(**options(oft_block_size=2, module_dropout=0.4))))
    (x,), expected = LINEAR.inputs(), {}
    for dropped in range(3):  # 0.4 of three blocks are one
        one = copy.deepcopy(model)
        with torch.no_grad():
            one[0].default.oft_R[dropped] = 0
        expected[dropped] = one(x)
    found = set()
    for seed in range(12):
        torch.manual_seed(seed)
        outputs = model.train()(x)
        found |= {dropped for dropped in expected if torch.allclose(outputs, expected[dropped], atol=1e-6)}
    assert found == {0, 1, 2}


def test_a_rotation_in_training_needs_an_operation():
    for acts in ("coft", "module_dropout"):
        config = OFTConfig(oft_block_size=5, target_modules=["up"], coft=acts == "coft", module_dropout=0.3)
        with pytest.raises(AdaptError, match=f"{acts} acts at an operation in training"):
            get_peft_model(Experts(), config)


def test_files_of_versions_that_meant_something_else_are_told(tmp_path: Any):
    OFTConfig(oft_block_size=4, peft_version="0.17.1").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"before 0\.18\.0, where the series had another last term"):
        graphpeft.PeftConfig.from_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "OFT", "r": 8, "target_modules": ["0"]}')
    with pytest.raises(CheckpointError, match=r"no oft_block_size.* before 0\.14\.0"):
        graphpeft.PeftConfig.from_pretrained(tmp_path)
