"""The verdict of `check_serving` on adapters: each rule by an adapter that breaks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_experts, tiny_llama
from safetensors.torch import load_file

from graphpeft import CheckpointError, LoHaConfig, LoraConfig, PeftModel, check_serving, get_peft_model, save_adapter

IDS = torch.tensor([[3, 7, 11, 2, 9, 23]])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def base() -> Any:
    """Returns a small Llama, the same in each call."""
    torch.manual_seed(0)
    return tiny_llama()


def saved(config: Any) -> Any:
    """Saves an adapter with any values, and returns its model."""
    model = get_peft_model(base(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained("adapter")
    return model.eval()


def lora(**options: Any) -> LoraConfig:
    """Returns a config of LoRA at the queries."""
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options})


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp"])
def test_plain_lora_is_served(server: str) -> None:
    saved(lora())
    report = check_serving("adapter", server)
    assert report.is_served
    assert "served" in str(report)


@pytest.mark.parametrize(
    ("server", "config", "outcome", "rule"),
    [
        ("vllm", LoHaConfig(r=2, target_modules=["q_proj"]), "refused", "it reads LoRA alone, and this is LOHA"),
        ("vllm", lora(use_dora=True), "refused", "use_dora=True"),
        ("vllm", lora(bias="lora_only", lora_bias=True), "refused", "lora_bias=True"),
        ("vllm", lora(init_lora_weights="pissa"), "refused", "init_lora_weights='pissa' has changed the base"),
        ("vllm", lora(modules_to_save=["lm_head"]), "refused", "modules_to_save has lm_head"),
        ("vllm", lora(trainable_token_indices=[1]), "refused", "token_adapter"),
        ("sglang", lora(use_dora=True), "refused", "use_dora=True"),
        ("sglang", lora(use_rslora=True), "wrong", "ignores use_rslora"),
        ("sglang", lora(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}), "wrong", "rank_pattern"),
        ("sglang", lora(target_modules="model.layers.0.*q_proj"), "refused", "the expression"),
        ("sglang", lora(modules_to_save=["lm_head"]), "wrong", "it drops base_model.model.lm_head.weight"),
        ("llama.cpp", lora(target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 2}), "wrong", "alpha_pattern"),
        ("llama.cpp", lora(init_lora_weights="olora"), "wrong", "has changed the base"),
        ("llama.cpp", lora(modules_to_save=["lm_head"]), "refused", "it stops at base_model.model.lm_head.weight"),
    ],
)
def test_each_rule_is_told_with_a_way_out(server: str, config: Any, outcome: str, rule: str) -> None:
    saved(config)
    report = check_serving("adapter", server)
    told = [each for each in report.broken if rule in each.rule]
    assert [each.outcome for each in told] == [outcome]
    assert told[0].way_out in str(report)


def test_whole_stacks_of_experts_are_told() -> None:
    get_peft_model(tiny_experts("eager"), lora(target_parameters=["down_proj"])).save_pretrained("adapter")
    assert check_serving("adapter", "vllm").is_served
    assert [each.outcome for each in check_serving("adapter", "sglang").broken] == ["wrong"]
    assert [each.outcome for each in check_serving("adapter", "llama.cpp").broken] == ["refused"]


def test_a_higher_rank_needs_an_option() -> None:
    saved(lora(r=20))
    assert check_serving("adapter", "vllm").needs == ("--max-lora-rank 32",)
    assert "--max-lora-rank 20" in check_serving("adapter", "sglang").needs


def test_the_way_out_of_ignored_scales_computes_the_same() -> None:
    config = lora(
        target_modules="model.layers.*(q_proj|v_proj)",
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"q_proj": 3},
    )
    model = saved(config)
    assert len(check_serving("adapter", "sglang").broken) == 2
    save_adapter(model, "plain", stack="plain")
    assert check_serving("plain", "sglang").is_served
    assert check_serving("plain", "llama.cpp").is_served
    torch.testing.assert_close(PeftModel.from_pretrained(base(), "plain")(IDS).logits, model(IDS).logits)
    # a reader that knows the ratio alone
    written = json.loads(Path("plain/adapter_config.json").read_text())
    tensors, merged = load_file("plain/adapter_model.safetensors"), base()
    for key, A in tensors.items():
        if key.endswith("lora_A.weight"):
            weight = merged.get_parameter(key.removeprefix("base_model.model.").replace("lora_A.weight", "weight"))
            B = tensors[key.replace("lora_A", "lora_B")]
            weight.data += written["lora_alpha"] / written["r"] * B @ A
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


def test_an_unknown_server_is_told() -> None:
    saved(lora())
    with pytest.raises(CheckpointError, match="the rules of 'tgi' aren't known"):
        check_serving("adapter", "tgi")
