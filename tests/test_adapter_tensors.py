"""Adapters that are handed over in memory, and merged models that are handed over and taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny_experts
from safetensors.torch import load_file
from torch import nn

from graphpeft import CheckpointError, LoraConfig, adapter_tensors, get_peft_model, save_adapter


def model(**options: Any) -> Any:
    """Returns a model with an adapter of any values."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    return get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False, **options))


@pytest.mark.parametrize("stack", ["peft", "plain", "mlx"])
def test_the_tensors_are_those_of_the_file(stack: str, tmp_path: Any) -> None:
    adapted = model(use_rslora=True, rank_pattern={"1": 4})
    given = adapter_tensors(adapted, stack=stack)
    save_adapter(adapted, tmp_path, stack=stack)
    name = "adapters" if stack == "mlx" else "adapter_model"
    found = load_file(tmp_path / f"{name}.safetensors")
    assert found.keys() == given.tensors.keys()
    assert all(torch.equal(found[key], given.tensors[key]) for key in found)
    assert not any(tensor.requires_grad for tensor in given.tensors.values())


def test_experts_have_the_names_of_the_checkpoint() -> None:
    config = LoraConfig(r=2, target_parameters=["gate_up_proj"])
    given = adapter_tensors(get_peft_model(tiny_experts("eager"), config), stack="transformers4")
    assert any(".experts.1.up_proj.lora_B.weight" in key for key in given.tensors)


def test_the_checksum_changes_with_a_bit_a_name_or_a_place() -> None:
    adapted = model()
    first = adapter_tensors(adapted).checksum
    assert adapter_tensors(adapted).checksum == first
    A = adapted[0].default.lora_A
    with torch.no_grad():
        A[0, 0] = torch.nextafter(A[0, 0], torch.tensor(9.0))
    assert adapter_tensors(adapted).checksum != first
    with torch.no_grad():
        A[0, 0] = torch.nextafter(A[0, 0], torch.tensor(-9.0))
        assert adapter_tensors(adapted).checksum == first
        A[0, :2] = A[0, :2].flip(0)
    assert adapter_tensors(adapted).checksum != first


def test_an_unknown_stack_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'vllm' is no stack"):
        adapter_tensors(model(), stack="vllm")


def test_a_thousand_hand_overs_of_a_merged_model_leave_no_bit_changed() -> None:
    torch.manual_seed(0)
    adapted: Any = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    get_peft_model(adapted, LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
    before = adapted[0]._parameters["weight"].clone()
    for _ in range(1000):
        adapted.merge_adapter()
        adapted.unmerge_adapter()
    assert torch.equal(adapted[0]._parameters["weight"], before)
