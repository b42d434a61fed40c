"""Any adapter that changes weights becomes plain LoRA, with PEFT's numbers, and at more kinds of layers."""

from __future__ import annotations

import copy
import typing
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
import torch.nn.functional as F
from models import LLAMA, Experts, call, result
from oracle import MATRICES, Case, by_peft, by_us
from peft.tuners.lora.conversion import convert_to_lora as convert_by_peft
from torch import Tensor, nn

import graphpeft


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.relu(self.conv(self.table(tokens).mT)).mT
        return self.head(self.attention(x, x, x)[0])


TOKENS = torch.tensor([[0, 1, 2, 3, 4], [6, 5, 1, 0, 2]])
EVERYWHERE = ["table", "conv", "attention", "head"]


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


def adapted(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(1)
    config = graphpeft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False} | options)
    return graphpeft.get_peft_model(model, config)


def converted(model: Any, base: nn.Module, rank: float) -> Any:
    """Returns a base with the adapter of a model as plain LoRA."""
    config, tensors = graphpeft.convert_to_lora(model, rank)
    plain = graphpeft.get_peft_model(base, config)
    assert graphpeft.set_peft_model_state_dict(plain, tensors).unexpected_keys == []
    return plain.eval()


@pytest.mark.parametrize("rank", [2, 0.8, 1.0])
@pytest.mark.parametrize("case", MATRICES, ids=str)
@pytest.mark.filterwarnings(
    "ignore:.*already a LoRA adapter", "ignore:Converting a PEFT", "ignore:fan_in_fan_out is set"
)
def test_lora_is_converted_to_pefts_factors(case: Case, rank: float):
    theirs = by_peft(case, r=4, lora_alpha=6, init_lora_weights=False)
    ours = by_us(case, r=4, lora_alpha=6, init_lora_weights=False)
    expected_config, expected = convert_by_peft(theirs, rank)
    config, found = graphpeft.convert_to_lora(ours, rank)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape
        # a singular vector has either sign, so only products are equal
        if "lora_B" in key:
            A = key.replace("lora_B", "lora_A")
            torch.testing.assert_close(found[key] @ found[A], tensor @ expected[A], rtol=0, atol=1e-6)
    assert config.r == config.lora_alpha
    assert (expected_config.rank_pattern or {}).get("0", expected_config.r) == config.r


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_the_whole_rank_gives_the_same_outputs_at_every_kind_of_layer(options: dict[str, Any]):
    names = [name for name in EVERYWHERE if not options.get("use_dora") or name != "attention"]
    model = adapted(mixed(), target_modules=names, **options)
    if options.get("use_dora"):
        plain = converted(model, mixed(), 1.0)
    else:
        with pytest.warns(graphpeft.PeftWarning, match="already a LoRA adapter"):
            plain = converted(model, mixed(), 1.0)
    assert not plain.peft_config["default"].use_dora
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(TOKENS), mixed()(TOKENS), atol=1e-2)


def test_a_stack_of_experts_is_converted_expert_by_expert():
    torch.manual_seed(0)
    base, x = Experts(), torch.randn(2, 3, 6)
    model = adapted(copy.deepcopy(base), target_parameters=["up"])
    with pytest.warns(graphpeft.PeftWarning, match="already a LoRA adapter"):
        plain = converted(model, copy.deepcopy(base), 4)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.warns(graphpeft.PeftWarning, match="already a LoRA adapter"):
        smaller = converted(model, copy.deepcopy(base), 1)
    assert not torch.allclose(smaller(x), model(x), atol=1e-3)


def test_a_share_gives_each_weight_the_rank_that_reaches_it_and_no_more():
    model = adapted(mixed(), target_modules=["conv", "head"], r=3, use_dora=True)
    delta = merged_change(model, "head.weight")
    squares = torch.linalg.svdvals(delta).square().cumsum(0)
    config, tensors = graphpeft.convert_to_lora(model, 0.7)
    rank = len(tensors["base_model.model.head.lora_A.weight"])
    assert squares[rank - 1] >= 0.7 * squares[-1]
    assert rank == 1 or squares[rank - 2] < 0.7 * squares[-1]
    assert config.rank_pattern == config.alpha_pattern


def merged_change(model: Any, weight: str) -> Tensor:
    before = dict(mixed().named_parameters())[weight]
    merged = copy.deepcopy(model).merge_and_unload()
    return (dict(merged.named_parameters())[weight] - before).detach()


def test_what_is_trained_fully_and_by_rows_is_taken_along(tmp_path: Path):
    options = {"target_modules": ["conv"], "modules_to_save": ["head"], "trainable_token_indices": {"table": [1, 4]}}
    model = adapted(mixed(), use_dora=True, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    graphpeft.save_as_lora(tmp_path / "plain", model, 1.0)
    for library in (graphpeft, peft):
        loaded = library.PeftModel.from_pretrained(mixed(), str(tmp_path / "plain")).eval()
        torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)


def test_a_merged_adapter_is_converted_like_an_active_one():
    model = adapted(mixed(), target_modules=["head"], use_dora=True)
    _, active = graphpeft.convert_to_lora(model, 2)
    model.merge_adapter()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, merged = graphpeft.convert_to_lora(model, 2)
    for key in active:
        torch.testing.assert_close(merged[key], active[key])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_converting_leaves_the_model_as_it_is():
    model = adapted(mixed(), target_modules=EVERYWHERE)
    before, out = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(TOKENS)
    with pytest.warns(graphpeft.PeftWarning, match="already a LoRA adapter"):
        graphpeft.convert_to_lora(model, 2)
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(TOKENS), out)


@pytest.mark.parametrize(
    ("rank", "reason"),
    [(0, "leaves nothing"), (-1, "leaves nothing"), (1.5, "between 0 and 1"), (9, "larger than head has rows")],
)
def test_ranks_that_can_not_be_are_refused(rank: float, reason: str):
    model = adapted(mixed(), target_modules=["head"], use_dora=True)
    with pytest.raises(ValueError, match=reason):
        graphpeft.convert_to_lora(model, rank)


@pytest.mark.parametrize("rank", ["a", None, True, torch.tensor(2)])
def test_what_is_no_number_is_no_rank(rank: Any):
    model = adapted(mixed(), target_modules=["head"], use_dora=True)
    with pytest.raises(TypeError, match=r"rank is a .*; give an int, or a share"):
        graphpeft.convert_to_lora(model, rank)


def test_integers_of_numpy_are_ranks():
    model = adapted(mixed(), target_modules=["head"], use_dora=True)
    assert graphpeft.convert_to_lora(model, typing.cast(int, numpy.int64(2)))[0].r == 2


def test_a_rank_that_the_groups_of_a_convolution_divide_is_refused_by_name():
    model = adapted(nn.Sequential(nn.Conv1d(8, 16, 5, groups=4)), target_modules=["0"], r=3)
    with (
        pytest.warns(graphpeft.PeftWarning, match="already a LoRA adapter"),
        pytest.raises(ValueError, match=r"0 can't have LoRA of this rank: its features are in 4 groups"),
    ):
        graphpeft.convert_to_lora(model, 4)


def test_replicated_layers_stay_replicated(tmp_path: Path):
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)], "use_dora": True}
    model = adapted(LLAMA.build(), **options)
    graphpeft.save_as_lora(tmp_path, model, 1.0)
    loaded = graphpeft.PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    expected = result(call(model.eval(), LLAMA.inputs()))
    torch.testing.assert_close(result(call(loaded, LLAMA.inputs())), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_is_more_than_changes_of_weights_says_so(options: dict[str, Any]):
    model = adapted(mixed(), target_modules=["head"], **options)
    assert not model.supports_lora_conversion()


def test_what_is_no_sum_of_weights_is_refused():
    with pytest.raises(TypeError, match="the Mixed has no adapters"):
        graphpeft.convert_to_lora(mixed(), 2)
    model = adapted(mixed(), target_modules=["head"], bias="all")
    with pytest.raises(ValueError, match="'default' changes biases"):
        graphpeft.convert_to_lora(model, 2)
    model = adapted(mixed(), target_modules=["head"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="'default' has taken a part of the weights"):
        graphpeft.convert_to_lora(model, 2)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (nn.Sequential(nn.LayerNorm(4)), graphpeft.LNTuningConfig(target_modules=["0"])),
        (nn.Sequential(nn.Embedding(4, 4)), graphpeft.TrainableTokensConfig(token_indices=[1], target_modules=["0"])),
    ],
    ids=["norm", "rows"],
)
def test_what_trains_modules_or_rows_as_they_are_is_no_lora(model: nn.Module, config: Any):
    model = graphpeft.get_peft_model(model, config)
    assert not model.supports_lora_conversion()  # type: ignore[operator]
    with pytest.raises(TypeError, match="that can't be LoRA: it trains modules or rows as they are"):
        graphpeft.convert_to_lora(model, 2)
