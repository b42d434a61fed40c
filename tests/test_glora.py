"""GLoRA: changes of a bias, and tensors of zeros in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import LINEAR, WITHOUT_BIAS, moved
from safetensors.torch import load_file, save_file

import graphpeft
from graphpeft import CheckpointError, GloraConfig, PeftModel, get_peft_model


def adapted(**options: Any) -> Any:
    return moved(get_peft_model(LINEAR.build(), GloraConfig(r=2, target_modules=["0"], **options)))


def test_a_bias_is_scaled_shifted_and_given_a_part_of_the_weight():
    model, base = adapted(config_A_B="none", config_C="vector", config_D_E="constant"), LINEAR.build()
    adapter, layer = model[0].default, base[0]  # pyright: ignore[reportIndexIssue]
    expected = layer.bias * (1 + adapter.glora_D_X) + adapter.glora_E_X + (layer.weight @ adapter.glora_C_X).flatten()
    merged = model.merge_and_unload()[0]
    torch.testing.assert_close(merged.bias, expected)
    assert torch.equal(merged.weight, layer.weight)


def test_one_of_two_cannot_be_merged_without_the_other():
    model = adapted()
    model.add_adapter("second", GloraConfig(r=1, target_modules=["0"]))
    model.set_adapter(["default", "second"])
    with pytest.raises(graphpeft.AdaptError, match="depends on the weight itself"):
        model.merge_adapter(["default"])


def test_zeros_of_files_take_no_memory(tmp_path: Path):
    base = WITHOUT_BIAS.build()
    model: Any = get_peft_model(base, GloraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition("glora_")[2]: tuple(t.shape) for key, t in tensors.items() if key.endswith("zeros")} == {
        "C.zeros": (6, 1),
        "D.zeros": (8,),
        "E.zeros": (8,),
    }
    assert model[0].default.glora_D_zeros.numel() == 0


def test_zeros_of_files_that_are_none_are_refused(tmp_path: Path):
    get_peft_model(WITHOUT_BIAS.build(), GloraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.0.glora_D.zeros": torch.ones(8)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"glora_D\.zeros has other numbers than zeros"):
        PeftModel.from_pretrained(WITHOUT_BIAS.build(), tmp_path)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="config_C must be"):
        GloraConfig(config_C="constant")  # pyright: ignore[reportArgumentType]
