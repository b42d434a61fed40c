"""SHiRA: the places of the elements, by functions of the user's and from files, and what can't be."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from oracle import LINEAR, TRANSPOSED, moved
from torch import Tensor, nn

from graphpeft import AdaptError, PeftModel, ShiraConfig, get_peft_model, get_peft_model_state_dict


def largest(layer: nn.Module, r: int, **options: Any) -> Tensor:
    """Returns a mask of the largest elements of a layer's weight."""
    weight: Any = layer.weight
    chosen = weight.detach().abs().flatten().topk(r * sum(weight.shape)).indices
    return torch.zeros(weight.numel()).index_fill(0, chosen, 1).view(weight.shape)


def with_mask(config: Any, function: Any = largest) -> Any:
    config.mask_fn = function
    return config


def test_a_function_of_the_users_chooses_the_places_as_in_peft():
    options: dict[str, Any] = {"r": 1, "mask_type": "largest", "target_modules": ["0"]}
    with pytest.warns(UserWarning, match="is not recognized"):
        theirs = peft.get_peft_model(LINEAR.build(), with_mask(peft.ShiraConfig(**options)))
    ours = get_peft_model(LINEAR.build(), with_mask(ShiraConfig(**options)))
    expected = peft.get_peft_model_state_dict(theirs)
    for key, tensor in get_peft_model_state_dict(ours).items():
        assert torch.equal(tensor, expected[key])


def test_places_of_the_users_are_read_from_the_file(tmp_path: Any):
    config = with_mask(ShiraConfig(r=1, mask_type="largest", target_modules=["0"]))
    model: Any = moved(get_peft_model(LINEAR.build(), config))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(LINEAR.build(), tmp_path)(*LINEAR.inputs()), model(*LINEAR.inputs()))


def test_a_mask_has_the_shape_in_which_its_layer_stores_the_weight():
    model: Any = moved(get_peft_model(TRANSPOSED.build(), with_mask(ShiraConfig(r=1, target_modules=["0"]))))
    mask, base = largest(TRANSPOSED.build()[0], 1), TRANSPOSED.build()  # pyright: ignore[reportIndexIssue]
    changed = model.merge_and_unload()[0].weight != base[0].weight  # pyright: ignore[reportIndexIssue]
    assert torch.equal(changed, mask == 1)


def test_the_places_stay_whole_numbers_in_half_precision():
    model: Any = get_peft_model(LINEAR.build(), ShiraConfig(r=1, target_modules=["0"])).half()
    assert model[0].default.shira_indices.dtype == torch.int32


def test_a_way_of_choosing_without_a_function_is_refused():
    base = LINEAR.build()
    with pytest.raises(AdaptError, match=r"mask_type='largest' has no function .* set config\.mask_fn"):
        get_peft_model(base, ShiraConfig(r=1, mask_type="largest", target_modules=["0"]))
    assert type(base[0]) is nn.Linear  # pyright: ignore[reportIndexIssue]


def test_a_mask_with_another_number_of_ones_is_refused():
    config = with_mask(ShiraConfig(r=1, target_modules=["0"]), lambda layer, r, **_: torch.ones_like(layer.weight))
    with pytest.raises(AdaptError, match=r"0: mask_fn returns 48 ones .* and r=1 asks for 14"):
        get_peft_model(LINEAR.build(), config)


def test_more_elements_than_the_weight_has_are_refused():
    with pytest.raises(AdaptError, match="r=4 makes more elements than the 48 of its weight"):
        get_peft_model(LINEAR.build(), ShiraConfig(r=4, target_modules=["0"]))
