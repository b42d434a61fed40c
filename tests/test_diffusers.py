"""Models of diffusers are adapted without example inputs, and their adapters are PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import graphpeft

diffusers: Any = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),  # PEFT's
]

OPTIONS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def unet() -> Any:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return model.eval()


def outputs(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return model(torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 12)).sample


def adapted(library: Any) -> Any:
    model = library.get_peft_model(unet(), library.LoraConfig(**OPTIONS))
    generator = torch.Generator().manual_seed(2)
    state = library.get_peft_model_state_dict(model)
    values = {name: torch.randn(state[name].shape, generator=generator) / 3 for name in sorted(state)}
    library.set_peft_model_state_dict(model, values)
    return model


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_unet_is_adapted_as_by_peft() -> None:
    ours, theirs = adapted(graphpeft), adapted(peft)
    close(outputs(ours), outputs(theirs))
    assert (outputs(ours) - outputs(unet())).abs().max() > 1e-2
    for model in (ours, theirs):
        outputs(model).square().sum().backward()
    trained = [parameter.grad for parameter in ours.parameters() if parameter.requires_grad]
    assert len(trained) == sum(parameter.requires_grad for parameter in theirs.parameters())
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in trained)


def test_files_of_a_unet_go_both_ways(tmp_path: Path) -> None:
    ours, theirs = adapted(graphpeft), adapted(peft)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    close(outputs(graphpeft.PeftModel.from_pretrained(unet(), tmp_path / "theirs")), outputs(theirs))
    close(outputs(peft.PeftModel.from_pretrained(unet(), str(tmp_path / "ours"))), outputs(ours))


def test_a_merged_unet_computes_the_same_with_its_own_classes() -> None:
    ours = adapted(graphpeft)
    expected, classes = outputs(ours), [type(module) for module in unet().modules()]
    merged = copy.deepcopy(ours).merge_and_unload()
    close(outputs(merged), expected)
    assert [type(module) for module in merged.modules()] == classes


# the methods for adapters of diffusers' own mixin, which go through a model for layers of PEFT


def injected(library: Any) -> Any:
    """Returns a UNet with two adapters, in PEFT by the functions that diffusers' methods call."""
    model, config = unet(), library.LoraConfig(**OPTIONS)
    library.inject_adapter_in_model(config, model, "first")
    other = library.LoraConfig(r=2, lora_alpha=7, target_modules=["to_q", "to_v", "conv1"])
    library.inject_adapter_in_model(other, model, "second")
    vars(model).setdefault("_hf_peft_config_loaded", True)
    generator = torch.Generator().manual_seed(2)
    for name in ("first", "second"):
        state = library.get_peft_model_state_dict(model, adapter_name=name)
        plain = sorted(key.removeprefix("base_model.model.") for key in state)
        values = {
            key: torch.randn(state.get(key, state.get(f"base_model.model.{key}")).shape, generator=generator) / 3
            for key in plain
        }
        prefix = "base_model.model." if library is graphpeft else ""
        library.set_peft_model_state_dict(model, {prefix + key: value for key, value in values.items()}, name)
    model.set_adapter("first")
    return model


def both() -> tuple[Any, Any]:
    return injected(graphpeft), injected(peft)


def test_adapters_are_active_with_weights() -> None:
    ours, theirs = both()
    for names, weights in (
        ("first", None),
        (["first", "second"], [0.5, 0.25]),
        (["first", "second"], 2.0),
        ("second", [None]),
        ("first", {"down": 0.3, "up": {"block_0": [0.2, 1.5]}}),
        (["first", "second"], [{"mid": 0.7}, 0.5]),
        ("second", {"down": 0.4, "up": 1.8}),
        ("second", [None]),
    ):
        for model in (ours, theirs):
            model.set_adapters(names, weights)
        close(outputs(ours), outputs(theirs))
    assert ours.active_adapters == ["second"]


def test_weights_that_are_refused_change_nothing() -> None:
    ours = injected(graphpeft)
    ours.set_adapters(["first", "second"], [0.5, 0.25])
    expected = outputs(ours)
    for names, weights, reason in (
        (["first"], [1.0, 2.0], "1 adapter and 2 weights were given"),
        (["first"], ["half"], "'half' is no weight"),
        (["first", "third"], [1.0, 2.0], "third"),
    ):
        with pytest.raises((ValueError, graphpeft.AdaptError), match=reason):
            ours.set_adapters(names, weights)
        assert torch.equal(outputs(ours), expected)


def test_a_scale_in_a_call_multiplies_the_adapters_of_that_call() -> None:
    ours, theirs = both()
    full = outputs(ours)
    for model in (ours, theirs):
        model.set_adapters(["first", "second"], [0.5, 1.0])
    torch.manual_seed(1)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 12)
    half = [model(*inputs, cross_attention_kwargs={"scale": 0.3}).sample for model in (ours, theirs)]
    close(half[0], half[1])
    ours.set_adapters("first")
    close(outputs(ours), full)
    ours.fuse_lora()
    with pytest.raises(graphpeft.AdaptError, match="their scales are in the weights"):
        ours(*inputs, cross_attention_kwargs={"scale": 0.3})


def test_adapters_are_fused_with_a_scale_and_unfused_to_the_bit() -> None:
    ours, theirs = both()
    before = outputs(ours)
    for model in (ours, theirs):
        model.set_adapters(["first", "second"], [0.5, 2.0])
        model.fuse_lora(lora_scale=0.7)
    close(outputs(ours), outputs(theirs))
    ours.unfuse_lora()
    ours.set_adapters("first")
    assert torch.equal(outputs(ours), before)


def test_adapters_are_switched_off_and_deleted_and_taken_off() -> None:
    ours = injected(graphpeft)
    expected, base = outputs(ours), outputs(unet())
    ours.disable_lora()
    close(outputs(ours), base)
    ours.enable_lora()
    assert torch.equal(outputs(ours), expected)
    with pytest.raises(graphpeft.AdaptError, match="third"):
        ours.delete_adapters(["second", "third"])
    ours.delete_adapters(["second"])
    assert list(ours.peft_config) == ["first"]
    copied = copy.deepcopy(ours)
    copied.unload_lora()
    assert type(copied) is diffusers.UNet2DConditionModel
    close(outputs(copied), base)
    assert torch.equal(outputs(ours), expected)


def test_a_saved_lora_adapter_is_read_by_diffusers(tmp_path: Path) -> None:
    ours = injected(graphpeft)
    ours.set_adapter("second")
    ours.save_lora_adapter(tmp_path, "second", upcast_before_saving=True)
    other = unet()
    other.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    close(outputs(other), outputs(ours))
    with pytest.raises(ValueError, match="no pickle"):
        ours.save_lora_adapter(tmp_path, "second", safe_serialization=False)


def test_loading_layers_of_peft_into_an_adapted_model_is_refused(tmp_path: Path) -> None:
    ours = injected(graphpeft)
    expected = outputs(ours)
    with pytest.raises(graphpeft.AdaptError, match=r"lets PEFT wrap layers.*load_adapter\(folder, name\)"):
        ours.load_lora_adapter(str(tmp_path))
    assert torch.equal(outputs(ours), expected)
