"""mlx-lm's files: what its formulas make of them is the adapter's change, and they are read again.

`make stacks` runs mlx-lm itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphpeft import CheckpointError, LoHaConfig, LoraConfig, PeftModel, TaskType, get_peft_model, save_adapter
from graphpeft.command import main

IDS = torch.tensor([[3, 7, 11, 2, 9, 23]])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def base() -> Any:
    """Returns a small Llama, the same in each call."""
    torch.manual_seed(0)
    return tiny_llama()


def trained(config: Any) -> Any:
    """Returns a model whose adapter has any values."""
    model = get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(parameter.abs() + noise.abs() if "magnitude" in name else noise)
    return model.eval()


def as_mlx_computes(model: nn.Module, folder: str) -> nn.Module:
    """Returns a model with the change of a folder's files by the formulas of mlx-lm: ``LoRALinear.fuse`` and others."""
    scale = json.loads(Path(folder, "adapter_config.json").read_text())["lora_parameters"]["scale"]
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(f"{folder}/adapters.safetensors").items():
        path, _, own = key.rpartition(".")
        by_layer.setdefault(path, {})[own] = tensor
    for path, own in by_layer.items():
        weight = model.get_parameter(f"{path}.weight")
        is_table = isinstance(model.get_submodule(path), nn.Embedding)
        change = scale * own["lora_a"] @ own["lora_b"]
        changed = weight.detach() + (change if is_table else change.T)
        if "m" in own:
            changed = (own["m"] / changed.norm(dim=1))[:, None] * changed
        weight.data.copy_(changed)
    return model


CONFIGS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {"r": 4, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
    "rsLoRA": {"r": 4, "use_rslora": True, "target_modules": ["v_proj"], "rank_pattern": {"layers.0.*": 8}},
    "DoRA": {"r": 2, "use_dora": True, "target_modules": ["q_proj", "o_proj"]},
    "embeddings": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"r": 2, "target_modules": ["lm_head"]},
    "one layer": {"r": 2, "target_modules": ["model.layers.0.self_attn.q_proj"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_mlx_computes_what_the_adapter_does(name: str) -> None:
    model = trained(LoraConfig(**CONFIGS[name]))
    save_adapter(model, "mlx", stack="mlx")
    expected, found = model(IDS).logits, as_mlx_computes(base(), "mlx")(IDS).logits
    assert (expected - base()(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_its_files_are_read_again(name: str) -> None:
    model = trained(LoraConfig(**CONFIGS[name]))
    save_adapter(model, "mlx", stack="mlx")
    again = PeftModel.from_pretrained(base(), "mlx")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=2e-5, rtol=1e-4)
    assert again.targeted_module_names == model.targeted_module_names
    assert again.state_dict().keys() == model.state_dict().keys()


def test_the_base_and_the_task_of_an_adapter_are_carried_along(capsys: pytest.CaptureFixture[str]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM, base_model_name_or_path="my/base")
    save_adapter(trained(config), "mlx", stack="mlx")
    assert main(["info", "mlx", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["base"], told["task"]) == ("my/base", "CAUSAL_LM")


@pytest.mark.parametrize("dropout", ["0.1", None, True])
def test_a_dropout_that_is_no_number_is_refused(dropout: Any) -> None:
    save_adapter(trained(LoraConfig(**CONFIGS["LoRA"])), "mlx", stack="mlx")
    config = json.loads(Path("mlx/adapter_config.json").read_text())
    config["lora_parameters"]["dropout"] = dropout
    Path("mlx/adapter_config.json").write_text(json.dumps(config))
    tensors = load_file("mlx/adapters.safetensors")
    save_file(tensors, "mlx/adapters.safetensors")  # without the digest of the config
    with pytest.raises(CheckpointError, match=f"dropout={dropout!r} is no number that LoRA can have"):
        PeftModel.from_pretrained(base(), "mlx")


def test_lora_of_one_rank_and_scale_comes_back_bit_for_bit() -> None:
    model = trained(LoraConfig(**CONFIGS["LoRA"]))
    model.save_pretrained("peft")
    save_adapter(model, "mlx", stack="mlx")
    PeftModel.from_pretrained(base(), "mlx").save_pretrained("again")
    given, found = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("peft", "again"))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoHaConfig(r=2, target_modules=["q_proj"]), "mlx-lm reads LoRA and DoRA, and this is an adapter of LOHA"),
        (LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", lora_bias=True), r"lora_bias=True, with which"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), r"no place for .*lm_head\.weight"),
        (LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]), "no place for .*token_adapter"),
    ],
)
def test_a_kind_that_mlx_does_not_read_is_refused(config: Any, reason: str) -> None:
    model = trained(config)
    with pytest.raises(CheckpointError, match=reason):
        save_adapter(model, "mlx", stack="mlx")
    assert not Path("mlx").exists()


def test_damaged_files_are_refused() -> None:
    save_adapter(trained(LoraConfig(**CONFIGS["LoRA"])), "mlx", stack="mlx")
    tensors = load_file("mlx/adapters.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if "lora_b" not in key}, "mlx/adapters.safetensors")
    with pytest.raises(CheckpointError, match="lacks a factor of"):
        PeftModel.from_pretrained(base(), "mlx")
    Path("mlx/adapter_config.json").write_text('{"fine_tune_type": "full"}')
    with pytest.raises(CheckpointError, match="no LoRA or DoRA of mlx-lm, but fine_tune_type='full'"):
        PeftModel.from_pretrained(base(), "mlx")


def test_an_unknown_library_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'mlz' is no stack"):
        save_adapter(trained(LoraConfig(**CONFIGS["LoRA"])), "mlz", stack="mlz")
