"""MiSS: blocks that are cut, blocks that multiply what other adapters have made, and blocks that don't fit."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.modules import LinearNF4
from oracle import LINEAR, moved
from quantised import by_bitsandbytes

import graphpeft
from graphpeft import AdaptError, LoraConfig, MissConfig, get_peft_model, own_weight


def adapted(**options: Any) -> Any:
    return moved(get_peft_model(LINEAR.build(), MissConfig(target_modules=["0"], **options)))


def test_the_last_block_of_columns_is_cut():
    model, base = adapted(r=4), LINEAR.build()
    block = model[0].default.miss_block.T
    change = model.merge_and_unload()[0].weight - base[0].weight  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(change, torch.cat([block, block[:, :2]], 1))


def test_a_small_block_is_repeated_along_the_outputs():
    model, base = adapted(r=3, mini_r=4, init_weights="mini"), LINEAR.build()
    block = model[0].default.miss_block.T
    change = model.merge_and_unload()[0].weight - base[0].weight  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(change, block.repeat(2, 2))


def test_bat_drops_nothing_where_a_file_says_dropout() -> None:
    model = adapted(r=2, init_weights="bat", miss_dropout=0.5, inference_mode=True).train()
    x = torch.ones(2, 6)
    assert torch.equal(model(x), model(x))


def test_bat_multiplies_what_an_adapter_before_has_made():
    model = adapted(r=2, init_weights="bat")
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    blocks, lora, weight = model[0].default.miss_block, model[0].lora, own_weight(model[0])
    so_far = weight + 4 * lora.lora_B @ lora.lora_A
    rows = [so_far[2 * i : 2 * i + 2].unflatten(1, (-1, 2)).transpose(0, 1) for i in range(4)]
    made = torch.cat([(w + w @ d + d).transpose(0, 1).flatten(1) for w, d in zip(rows, blocks, strict=True)])
    model.set_adapter(["lora", "default"])
    (x,) = LINEAR.inputs()
    torch.testing.assert_close(model(x), torch.tanh(x @ made.T + model[0].bias))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"r": 7}, "r=7 is more than the 6 columns of its weight"),
        ({"r": 2, "mini_r": 3, "init_weights": "mini"}, "mini_r=3 doesn't divide the 8 rows of its weight"),
        ({"r": 4, "init_weights": "bat"}, "init_weights='bat' needs blocks of 4×4, and its weight is 8×6"),
        ({"r": 2, "init_weights": "bat", "miss_dropout": 0.1}, "has no branch for miss_dropout; set it to 0"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(AdaptError, match=reason):
        get_peft_model(LINEAR.build(), MissConfig(target_modules=["0"], **options))


@pytest.mark.parametrize("options", [{"r": 5}, {"r": 8, "mini_r": 4, "init_weights": "mini"}], ids=str)
def test_quantised_layers_are_adapted_at_their_calls_as_in_peft(options: dict[str, Any]):
    build = by_bitsandbytes(LinearNF4)
    models = []
    for library in (peft, graphpeft):
        torch.manual_seed(0)
        config = library.MissConfig(target_modules=["0", "2"], **options)
        models.append(moved(library.get_peft_model(build(), config)))
    theirs, ours = models
    x = torch.randn(3, 64)
    expected = ours(x)
    torch.testing.assert_close(expected, theirs(x))
    torch.testing.assert_close(ours.merge_and_unload(dequantize=True)(x), expected)


def test_blocks_that_multiply_the_weight_are_refused_at_a_quantised_layer():
    config = MissConfig(r=4, init_weights="bat", target_modules=["0"])
    with pytest.raises(AdaptError, match="MISS changes weights, and it is the call of a module whose weight is quant"):
        get_peft_model(by_bitsandbytes(LinearNF4)(), config)
