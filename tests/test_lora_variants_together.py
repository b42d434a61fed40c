"""DoRA, biases of B and weights with a part taken, beside other adapters: merged, mixed, combined, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_close, perturb
from torch import nn

import graphpeft
from graphpeft import AdaptError


def linears(**options: Any) -> Any:
    return graphpeft.LoraConfig(**{"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False, **options})


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def several(**options: Any) -> Any:
    """Returns a model with a plain adapter `plain`, and one with these options as `odd`, which is active."""
    model = graphpeft.get_peft_model(two_layers(), linears(), "plain")
    model.add_adapter("odd", linears(**options))
    perturb(model)
    model.set_adapter("odd")
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_merging_in_place_gives_the_same_values_and_the_very_bits_back(options: dict[str, Any]):
    model, x = several(**options), torch.randn(5, 4)
    for names in (["odd"], ["plain", "odd"], ["odd", "plain"]):
        model.set_adapter(names)
        expected, before = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.merge_adapter()
        assert_close(model(x), expected)
        model.unmerge_adapter()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(model(x), expected)


def test_what_is_merged_in_turn_is_merged_as_at_once():
    model, x = several(use_dora=True), torch.randn(5, 4)
    model.set_adapter(["plain", "odd"])
    expected = model(x)
    for alone in ("plain", "odd"):
        with pytest.raises(AdaptError, match="'odd' depends on the weight itself"):
            model.merge_adapter([alone])
    assert torch.equal(model(x), expected)
    assert_close(model.merge_and_unload()(x), expected)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_rows_of_a_batch_can_have_it(options: dict[str, Any]):
    model, x = several(**options), torch.randn(3, 4)
    names = ["odd", "plain", "__base__"]
    alone = []
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        alone.append(model(x[row : row + 1]))
    with model.disable_adapter():
        alone.append(model(x[2:]))
    assert_close(model(x, adapter_names=names), torch.cat(alone))


def test_a_bias_of_b_cannot_be_combined():
    with pytest.raises(AdaptError, match="other ones than A and B"):
        several(lora_bias=True).add_weighted_adapter(["plain", "odd"], [1, 1], "both", "cat")


def test_what_has_taken_from_the_weight_is_neither_combined_nor_merged_in_place():
    model, x = several(init_lora_weights="pissa"), torch.randn(2, 4)
    expected = model(x)
    for refused in (
        lambda: model.merge_adapter(),
        lambda: model.add_weighted_adapter(["plain", "odd"], [1, 1], "both", "cat"),
    ):
        with pytest.raises(AdaptError, match=r"has taken a part|in the place of"):
            refused()
        assert torch.equal(model(x), expected)


def test_what_looks_at_weights_sees_them_unmerged():
    model = several(use_dora=True)
    model.set_adapter("plain")
    model.merge_adapter()
    torch.manual_seed(1)
    model.add_adapter("late", linears(use_dora=True))
    other = graphpeft.get_peft_model(two_layers(), linears(), "plain")
    torch.manual_seed(1)
    other.add_adapter("late", linears(use_dora=True))
    assert torch.equal(model[0].late.lora_magnitude, other[0].late.lora_magnitude)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=["dora", "bias", "pissa"]
)
def test_parts_and_attentions_have_plain_lora_alone(options: dict[str, Any]):
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(AdaptError, match="it is one of several weights of a module"):
        graphpeft.get_peft_model(attention, linears(target_modules=["0"], **options))
    parts = linears(target_modules=["0"], target_parts={"0": [(0, 2)]}, **options)
    with pytest.raises(AdaptError, match="it is a part of one"):
        graphpeft.get_peft_model(two_layers(), parts)
