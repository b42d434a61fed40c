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

pytestmark = pytest.mark.integrations

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
