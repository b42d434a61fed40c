"""VeRA's projections: one pair for all layers, drawn by a seed, saved once or not at all."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from matrix_uses import TARGETS, build, inputs
from oracle import moved

import graphpeft
from graphpeft import (
    AdaptError,
    CheckpointError,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to", "ignore:Specified to not")


def adapted(library: Any = graphpeft, **options: Any) -> Any:
    torch.manual_seed(2)
    return library.get_peft_model(build(), library.VeraConfig(**{"r": 3, "target_modules": TARGETS} | options))


def test_all_layers_have_one_pair_of_projections_of_the_largest_sizes():
    model = adapted()
    first, *others = (model.get_submodule(path).default for path in TARGETS)
    assert (first.vera_A.shape, first.vera_B.shape) == ((3, 8), (10, 3))
    assert all(other.vera_A is first.vera_A and other.vera_B is first.vera_B for other in others)
    assert not first.vera_A.requires_grad
    keys = get_peft_model_state_dict(model)
    assert [key for key in keys if "lambda" not in key] == ["base_model.vera_A", "base_model.vera_B"]


@pytest.mark.parametrize("options", [{"projection_prng_key": 5}, {"save_projection": False}], ids=str)
def test_the_projections_are_those_of_their_seed_as_in_peft(options: dict[str, Any], tmp_path: Any):
    theirs, ours = (moved(adapted(library, **options)) for library in (peft, graphpeft))
    torch.testing.assert_close(ours(inputs()), theirs(inputs()))
    ours.save_pretrained(tmp_path)
    for library in (peft, graphpeft):
        loaded = library.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
        torch.testing.assert_close(loaded(inputs()), ours(inputs()))


def test_the_global_generator_is_left_alone_by_the_projections():
    states = []
    for key in (0, 1):
        adapted(projection_prng_key=key)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"projection_prng_key": 1}, "projection_prng_key is 1, and 0 of the adapter 'default'"),
        ({"save_projection": False}, "save_projection is False, and True of the adapter 'default'"),
    ],
    ids=str,
)
def test_another_adapter_with_other_projections_is_refused(options: dict[str, Any], reason: str, tmp_path: Any):
    model, config = adapted(), VeraConfig(r=3, target_modules=["0"], **options)
    before = get_peft_model_state_dict(model)
    with pytest.raises(AdaptError, match=reason):
        model.add_adapter("other", config)
    get_peft_model(build(), config).save_pretrained(tmp_path)
    with pytest.raises(AdaptError, match=reason):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]
    assert get_peft_model_state_dict(model).keys() == before.keys()
    model.add_adapter("other", VeraConfig(r=5, target_modules=["0"]))
    with pytest.raises(AdaptError, match=reason):
        hotswap_adapter(model, tmp_path, "other")
    model.set_adapter("other")
    model.delete_adapter("default")
    hotswap_adapter(model, tmp_path, "other")


def test_a_file_without_the_projections_that_its_config_announces_is_refused(tmp_path: Any):
    adapted(save_projection=False).save_pretrained(tmp_path)
    config = VeraConfig(r=3, target_modules=TARGETS)
    with pytest.raises(CheckpointError, match=r"lacks base_model\.vera_A"):
        PeftModel.from_pretrained(build(), tmp_path, config=config)


def test_exclude_modules_is_no_option_as_in_peft():
    with pytest.raises(TypeError, match="VeraConfig has no option 'exclude_modules'"):
        VeraConfig(exclude_modules=["0"])
