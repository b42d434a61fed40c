"""A fully fine-tuned model as LoRA, and how far conversions move the outputs."""

import copy
from typing import Any

import pytest
import torch
from models import LLAMA, output
from torch import Tensor, nn

import graphpeft
from graphpeft import LoHaConfig, conversion_deviation, convert_to_lora, extract_lora, get_peft_model
from graphpeft.testing import laws


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def images() -> Tensor:
    return torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(2))


def before_and_after(*changed: str) -> tuple[nn.Module, nn.Module]:
    """Returns a model, and a copy with other values of the parameters of these names."""
    torch.manual_seed(0)
    base = Net().eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name in changed:
            parameter = tuned.get_parameter(name)
            parameter += torch.randn_like(parameter)
    return base, tuned


def with_lora(base: nn.Module, found: tuple[Any, Any]) -> nn.Module:
    config, tensors = found
    model = get_peft_model(copy.deepcopy(base), config)
    assert graphpeft.set_peft_model_state_dict(model, tensors).unexpected_keys == []
    adapted: nn.Module = model.eval()
    return adapted


def test_full_ranks_give_the_tuned_model() -> None:
    base, tuned = before_and_after("conv.weight", "head.weight")
    found = extract_lora(base, tuned, 1.0, ["conv", "head"])
    torch.testing.assert_close(with_lora(base, found)(images()), tuned(images()), atol=1e-4, rtol=1e-4)
    laws.require_equal(dict(base.named_parameters()), dict(before_and_after()[0].named_parameters()), "base changed")


def test_a_lower_rank_gives_the_nearest_product() -> None:
    base, tuned = before_and_after("head.weight")
    _, tensors = extract_lora(base, tuned, 2, ["head"])
    A, B = (tensors[f"base_model.model.head.lora_{name}.weight"] for name in "AB")
    U, S, V = torch.linalg.svd(tuned.get_parameter("head.weight") - base.get_parameter("head.weight"))
    torch.testing.assert_close(B @ A, (U[:, :2] * S[:2]) @ V[:2], atol=1e-5, rtol=1e-4)


def test_modules_that_lora_has_no_place_for_are_taken_along_whole() -> None:
    base, tuned = before_and_after("conv.weight", "norm.weight", "norm.bias")
    tuned.get_buffer("norm.running_mean").add_(0.5)
    found = extract_lora(base, tuned, 1.0, ["conv"], modules_to_save=["norm"])
    torch.testing.assert_close(with_lora(base, found)(images()), tuned(images()), atol=1e-4, rtol=1e-4)


def test_another_difference_is_refused_by_name() -> None:
    base, tuned = before_and_after("conv.weight", "head.bias", "norm.weight")
    with pytest.raises(ValueError, match=r"also differ in norm\.weight, head\.bias, which LoRA on these targets"):
        extract_lora(base, tuned, 2, ["conv"])


def test_models_of_other_shapes_are_refused() -> None:
    base, tuned = before_and_after()
    tuned.head = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"aren't one model before and after: head\.bias, head\.weight differ"):
        extract_lora(base, tuned, 2, ["head"])


def test_adapted_models_are_refused() -> None:
    base, tuned = before_and_after()
    get_peft_model(tuned, graphpeft.LoraConfig(r=2, target_modules=["head"]))
    with pytest.raises(TypeError, match=r"a Net has adapters; merge_and_unload\(\)"):
        extract_lora(base, tuned, 2, ["head"])


def test_a_tuned_llama_is_extracted() -> None:
    base, tuned = LLAMA.build().eval(), LLAMA.build().eval()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "proj" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    found = extract_lora(base, tuned, 1.0)
    torch.testing.assert_close(
        output(with_lora(base, found), LLAMA.inputs()), output(tuned, LLAMA.inputs()), atol=1e-4, rtol=1e-3
    )


# how far the outputs move


def loha(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(1)
    config = LoHaConfig(**{"r": 4, "alpha": 6, "target_modules": ["head"], "init_weights": False} | options)
    return get_peft_model(model, config)


def test_the_deviation_is_that_of_the_outputs_and_leaves_the_model_as_it_is() -> None:
    base, _ = before_and_after()
    model = loha(copy.deepcopy(base)).train()
    config, tensors = convert_to_lora(model, 2)
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = conversion_deviation(model, (config, tensors), (images(),))
    assert model.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    laws.require_equal(model.state_dict(), state, "it changed")
    expected = model.eval()(images())
    difference = (with_lora(base, (config, tensors))(images()) - expected).abs().max() / expected.abs().max()
    assert found == pytest.approx(difference.item(), rel=1e-4)
    assert found > 1e-3


def test_ranks_that_suffice_deviate_by_rounding() -> None:
    model = loha(before_and_after()[0])
    assert conversion_deviation(model, convert_to_lora(model, 5), {"x": images()}) < 1e-6


def test_each_of_two_adapters_is_compared_by_itself() -> None:
    model = loha(before_and_after()[0])
    model.add_adapter("other", LoHaConfig(r=3, target_modules=["head"], init_weights=False))
    model.set_adapter(["default", "other"])
    converted = convert_to_lora(model, 5, "other")
    assert conversion_deviation(model, converted, (images(),), "other") < 1e-6
    assert conversion_deviation(model, converted, (images(),), "default") > 1e-3
    assert model.active_adapters == ["default", "other"]
