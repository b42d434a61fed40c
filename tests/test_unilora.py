"""Uni-LoRA's vector, and the places of its elements in all factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matrix_uses import TARGETS, build, inputs
from safetensors.torch import load_file, save_file

from graphpeft import CheckpointError, PeftModel, UniLoraConfig, get_peft_model, get_peft_model_state_dict


def adapted(**options: Any) -> Any:
    torch.manual_seed(2)
    config = UniLoraConfig(**{"r": 3, "theta_d_length": 11, "target_modules": TARGETS} | options)
    return get_peft_model(build(), config)


def test_one_vector_is_all_that_is_trained_and_saved():
    model = adapted()
    trained = [(name, parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [("0.default.unilora_theta_d", (11,))]
    assert [*get_peft_model_state_dict(model)] == ["base_model.unilora_theta_d"]


def test_each_element_is_at_equally_many_places_of_all_layers_together():
    model = adapted()
    factors = [model.get_submodule(path).default for path in TARGETS]
    places = torch.cat(
        [f.unilora_indices_A.flatten() for f in factors] + [f.unilora_indices_B.flatten() for f in factors]
    )
    scales = torch.cat(
        [f.unilora_scales_A.flatten() for f in factors] + [f.unilora_scales_B.flatten() for f in factors]
    )
    counts = places.bincount(minlength=11)
    assert counts.max() - counts.min() <= 1
    torch.testing.assert_close(scales, counts[places].float().rsqrt())


def test_places_that_are_saved_are_kept_whatever_the_seed_draws(tmp_path: Path):
    model = adapted(save_indices=True, proj_seed=5).eval()
    model.save_pretrained(tmp_path)
    config = UniLoraConfig.from_pretrained(tmp_path)
    config.proj_seed = 6
    loaded = PeftModel.from_pretrained(build(), tmp_path, config=config).eval()
    assert torch.equal(loaded(inputs()), model(inputs()))
    assert not torch.equal(adapted(proj_seed=6).eval()(inputs()), model(inputs()))


def test_places_stay_whole_numbers_in_half_precision():
    model = adapted().to(torch.bfloat16)
    assert model[0].default.unilora_indices_A.dtype == torch.int64
    assert model[0].default.unilora_theta_d.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (lambda places: places + 11, "places beyond the 11 elements"),
        (lambda places: places.float(), r"of torch\.float32"),
    ],
    ids=["place", "kind"],
)
def test_damaged_places_are_refused(damaged: Any, reason: str, tmp_path: Path):
    adapted(save_indices=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.0.unilora_indices_A"
    tensors[key] = damaged(tensors[key])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        PeftModel.from_pretrained(build(), tmp_path)


@pytest.mark.parametrize(
    ("option", "reason"),
    [({"init_theta_d_bound": 0.0}, "it must be positive"), ({"proj_seed": -1}, "proj_seed"), ({"r": 0}, "r ")],
    ids=str,
)
def test_values_that_pefts_config_refuses_are_refused(option: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        UniLoraConfig(**option)
