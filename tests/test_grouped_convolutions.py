"""Convolutions whose features are in groups: PEFT's numbers where it has them, and ranks that don't fit the groups."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from graphpeft import AdaptError, LoraConfig, PeftModel, explain, get_peft_model, own_weight
from graphpeft.testing import laws

pytestmark = pytest.mark.quick("methods")

Make = Callable[[], nn.Module]

LAYERS: dict[str, Make] = {
    "1d": lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1, groups=2),
    "2d": lambda: nn.Conv2d(4, 8, (3, 2), groups=4, bias=False),
    "3d": lambda: nn.Conv3d(4, 6, 2, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "depthwise, several each": lambda: nn.Conv1d(4, 12, 3, groups=4),
}

TRANSPOSED: dict[str, Make] = {
    "transposed 1d": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2),
    "transposed depthwise 2d": lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False),
}


def _model(make: Make) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(make(), nn.Tanh())


def _input(model: Any) -> torch.Tensor:
    return torch.randn(2, 4, *(7,) * (model[0].weight.ndim - 2), generator=torch.Generator().manual_seed(2))


def _options(rank: int, **more: Any) -> dict[str, Any]:
    return {"target_modules": ["0"], "r": rank, "lora_alpha": 7, "init_lora_weights": False, **more}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_dora_in_groups_has_pefts_numbers_both_ways(make: Make, tmp_path: Path):
    model = _model(make)
    x = _input(model)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="groups > 1"):
        theirs: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**_options(8, use_dora=True)))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    torch.manual_seed(3)
    ours: Any = get_peft_model(copy.deepcopy(model), LoraConfig(**_options(8, use_dora=True)))
    expected = theirs.train()(x)
    laws.require_close(ours.train()(x), expected, 1e-5, "ours and theirs by one seed")
    loaded: Any = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "theirs"), is_trainable=True)
    with torch.no_grad():
        for tensor in loaded.parameters():
            if tensor.requires_grad:
                tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4)) / 4
    loaded(x).square().sum().backward()
    assert all(tensor.grad is not None for tensor in loaded.parameters() if tensor.requires_grad)
    loaded.save_pretrained(str(tmp_path / "ours"))
    with pytest.warns(UserWarning, match="groups > 1"):
        again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"))
    laws.require_close(again(x), loaded.eval()(x), 1e-5, "theirs and ours")


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_fresh_adapter_of_dora_changes_nothing(make: Make):
    model = _model(make)
    x = _input(model)
    base = model(x)
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["0"], r=8, use_dora=True))
    assert torch.equal(adapted(x), base)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("make", [*LAYERS.values(), *TRANSPOSED.values()], ids=[*LAYERS, *TRANSPOSED])
def test_a_rank_that_the_groups_do_not_divide_stays_within_them(make: Make, rank: int, use_dora: bool, tmp_path: Path):
    model = _model(make)
    if use_dora and isinstance(model.get_submodule("0"), nn.modules.conv._ConvTransposeNd):
        pytest.skip("DoRA isn't for these")
    x = _input(model)
    base = model(x)
    adapted: Any = get_peft_model(copy.deepcopy(model), LoraConfig(**_options(rank, use_dora=use_dora)))
    found = adapted(x)
    assert not torch.allclose(found, base)
    found.square().sum().backward()
    assert all(tensor.grad is not None for tensor in adapted.parameters() if tensor.requires_grad)
    adapted.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(loaded(x), found)
    laws.require_close(loaded.merge_and_unload()(x), found, 1e-5, "merged and adapted")
    assert torch.equal(adapted.unload()(x), base)


def test_a_bias_of_b_and_dropout_go_with_any_rank():
    model = _model(LAYERS["1d"])
    x = _input(model)
    options = _options(3, lora_bias=True, lora_dropout=0.3)
    adapted: Any = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    with torch.no_grad():
        adapted.get_parameter("0.default.lora_bias").fill_(0.5)
    found = adapted.eval()(x)
    assert not torch.allclose(adapted.train()(x), found)
    laws.require_close(adapted.eval().merge_and_unload()(x), found, 1e-5, "merged and adapted")


def _with_two(rank: int) -> tuple[Any, torch.Tensor]:
    model: Any = get_peft_model(_model(LAYERS["depthwise"]), LoraConfig(**_options(rank)), "one")
    model.add_adapter("two", LoraConfig(**_options(rank)))
    return model, _input(model)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_adapters_within_groups_are_combined(kind: str):
    model, x = _with_two(3)
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both", combination_type=kind, svd_rank=6)
    model.set_adapter("both")
    found = model(x)
    changes = []
    for name in ("one", "two"):
        alone = copy.deepcopy(model)
        alone.set_adapter(name)
        before = own_weight(model[0]).detach().clone()
        changes.append(alone.merge_and_unload()[0].weight - before)
    expected: Any = copy.deepcopy(model).unload()
    with torch.no_grad():
        expected[0].weight += 0.5 * changes[0] + 2 * changes[1]
    laws.require_close(found, expected(x), 1e-5, "combined, and the sum of both")


def test_adapters_within_groups_have_no_combination_across_them():
    model, _ = _with_two(2)
    with pytest.raises(ValueError, match="features in groups, which divide only one of the ranks"):
        model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both", combination_type="cat")


def test_explain_tells_which_convolutions_cannot_be_merged_and_why():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.Tanh(), nn.Conv1d(8, 8, 1, groups=2), nn.Conv1d(8, 4, 1))
    report = explain(model, LoraConfig(r=4, target_modules=["0", "2", "3"]))
    reason, also, merges = (row.unmergeable for row in report.adapted)
    assert reason is not None
    assert also == reason
    assert merges is None
    lines = str(report).splitlines()
    assert lines[-3:-1] == ["can't be merged  because", f"───────────────  {'─' * len(reason)}"]
    assert lines[-1] == f"0, 2             {reason}"
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "2", "3"]))
    with pytest.raises(AdaptError, match=re.escape(reason)):
        adapted.merge_and_unload()
    assert "can't be merged" not in str(explain(nn.Sequential(nn.Conv1d(4, 8, 3)), LoraConfig(target_modules=["0"])))
