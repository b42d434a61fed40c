"""Weight decomposition around other methods; PEFT has it for LoRA alone."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import graphpeft
from graphpeft import (
    AdaLoraConfig,
    AdaptError,
    GloraConfig,
    HiraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TaskType,
    WeightDecomposedConfig,
    get_peft_model,
)
from graphpeft.testing import laws

LOHA: dict[str, Any] = {"r": 2, "alpha": 3}


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.LayerNorm(4)).eval()


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU()).eval()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w)


def decomposed(model: nn.Module, direction: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, WeightDecomposedConfig(direction=direction, **options))


@pytest.mark.parametrize(
    ("build", "shape", "over"),
    [(linear, (3, 6), (1,)), (convolution, (2, 4, 5, 5), (1, 2, 3))],
    ids=["matrix", "kernel"],
)
def test_the_weight_has_the_direction_of_the_other_methods_and_the_magnitudes_as_lengths(
    build: Any, shape: tuple[int, ...], over: tuple[int, ...]
) -> None:
    config = LoHaConfig(**LOHA, target_modules=["0"], init_weights=False)
    model = laws.perturbed(decomposed(build(), config))
    plain = get_peft_model(build(), config)
    tensors = graphpeft.get_peft_model_state_dict(model)
    magnitude = tensors.pop("base_model.model.0.magnitude")
    graphpeft.set_peft_model_state_dict(plain, tensors)
    with_change = plain.merge_and_unload()[0]
    lengths = with_change.weight.square().sum(over, keepdim=True).sqrt()
    expected = build()
    expected[0].weight.data = magnitude.view_as(lengths) * with_change.weight.data / lengths
    x = torch.randn(shape)
    torch.testing.assert_close(model(x), expected(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(x), expected(x), atol=1e-5, rtol=1e-5)


def test_lengths_have_no_gradient_and_all_else_has() -> None:
    model = laws.perturbed(decomposed(linear(), LoHaConfig(**LOHA, target_modules=["0"])))
    x, holder = torch.randn(3, 6), model[0].default
    model(x).square().sum().backward()
    own = [(name, each.detach().clone().requires_grad_()) for name, each in holder.named_parameters()]
    values = dict(own)
    change = (values["hada_w1_a"] @ values["hada_w1_b"]) * (values["hada_w2_a"] @ values["hada_w2_b"]) * 1.5
    weight = linear()[0].weight.detach() + change  # type: ignore[index]
    weight = values["magnitude"][:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
    hidden = nn.functional.linear(x, weight, model[0].bias)
    model[2:](nn.functional.gelu(hidden)).square().sum().backward()
    assert len(own) == 5
    for name, expected in own:
        torch.testing.assert_close(holder.get_parameter(name).grad, expected.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("direction", [LoHaConfig(**LOHA), LoKrConfig(**LOHA), HiraConfig(r=2)], ids=lambda c: c.method)
def test_experts_have_magnitudes_for_each(direction: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Experts())
    base, x = copy.deepcopy(model), torch.randn(3, 2, 6)
    direction = copy.copy(direction)
    direction.target_modules = ["0.w"]
    adapted = decomposed(model, direction)
    assert adapted[0].default.w_magnitude.shape == (3, 6)
    assert torch.equal(adapted(x), base(x))


def test_files_hold_the_direction_and_peft_refuses_them(tmp_path: Path) -> None:
    direction = LoHaConfig(**LOHA, target_modules=["0", "2"], rank_pattern={"2": 3}, alpha_pattern={"0": 5})
    model = laws.perturbed(decomposed(linear(), direction, modules_to_save=["3"]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(linear(), tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), model(x))
    found = loaded.peft_config["default"]
    assert isinstance(found.direction, LoHaConfig)
    [site, _] = [adapted.site for adapted in loaded.adapter_report().adapted]
    assert (found.direction.value_at("alpha", site), found.modules_to_save) == (5, ["3"])
    with pytest.raises(KeyError, match="GRAPHPEFT_WEIGHT_DECOMPOSED"):
        peft.PeftModel.from_pretrained(linear(), str(tmp_path))


def test_two_of_them_and_lora_act_together_as_they_merge() -> None:
    model = decomposed(linear(), LoHaConfig(**LOHA, target_modules=["0"], init_weights=False))
    model.add_adapter("lora", LoraConfig(r=2, lora_alpha=5, target_modules=["0"], init_lora_weights=False))
    model.add_adapter(
        "lokr", WeightDecomposedConfig(direction=LoKrConfig(r=2, target_modules=["0"], init_weights=False))
    )
    laws.perturbed(model)
    model.set_adapter(["lora", "default", "lokr"])
    x = torch.randn(3, 6)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-5, rtol=1e-5)


def test_the_length_by_which_it_divides_knows_nothing_of_earlier_adapters() -> None:
    model = decomposed(linear(), LoHaConfig(**LOHA, target_modules=["0"], init_weights=False))
    model.add_adapter("lora", LoraConfig(r=2, lora_alpha=5, target_modules=["0"], init_lora_weights=False))
    laws.perturbed(model)
    of_base, weights = linear().get_parameter("0.weight"), {}
    for names in (("default",), ("lora",), ("lora", "default")):
        model.set_adapter([*names])
        weights[names] = copy.deepcopy(model).merge_and_unload()[0].weight.detach()
    factors = (weights["lora", "default"] - weights["default",]) / (weights["lora",] - of_base.detach())
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("direction", "reason"),
    [
        (LoraConfig(target_modules=["0"]), r"take LoraConfig\(use_dora=True\)"),
        (AdaLoraConfig(total_step=9, target_modules=["0"]), "ADALORA can't be a direction"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type=TaskType.CAUSAL_LM), "give a config that names weights"),
        (None, "give a config that names weights"),
    ],
    ids=["lora", "adalora", "prompt", "none"],
)
def test_methods_that_are_no_change_of_each_weight_are_refused(direction: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        WeightDecomposedConfig(direction=direction)


@pytest.mark.parametrize(
    ("direction", "reason"),
    [
        (LoHaConfig(**LOHA, rank_dropout=0.2, target_modules=["0"]), "rank_dropout acts on more than the change"),
        (GloraConfig(r=2, target_modules=["0"]), "GLORA changes biases, too"),
        (graphpeft.BeftConfig(target_modules=["0"]), "BEFT does more there than to add a change"),
        (graphpeft.OFTConfig(oft_block_size=2, target_modules=["0"]), "OFT does more there"),
    ],
    ids=["rank_dropout", "glora", "beft", "oft"],
)
def test_sites_where_a_method_does_more_are_refused(direction: Any, reason: str) -> None:
    model = linear()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdaptError, match=reason):
        decomposed(model, direction)
    laws.require_equal(model.state_dict(), before, "a refused config changed the model")


def test_the_digest_of_its_config_leaves_out_what_says_nothing_of_the_tensors() -> None:
    config = WeightDecomposedConfig(direction=LoKrConfig(r=2, target_modules=["0"]))
    other = WeightDecomposedConfig(
        direction=LoKrConfig(r=2, target_modules=["0"], module_dropout=0.5), base_model_name_or_path="mine"
    )
    assert config.digest() == other.digest()
    assert config.digest() != WeightDecomposedConfig(direction=LoKrConfig(r=3, target_modules=["0"])).digest()
