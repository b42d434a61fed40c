"""The methods that an adapted model gains mean what PEFT's and Transformers' of the same names mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import LLAMA, MLP, output

from graphpeft import (
    AdaptError,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)


def adapted(name: str = "default") -> Any:
    """Returns an adapted model whose adapter matters."""
    return get_peft_model(MLP.build(), MLP.config(init_lora_weights=False), name)


def test_disabled_adapters_rest_until_they_are_enabled():
    model = get_peft_model(LLAMA.build(), LLAMA.config(init_lora_weights=False))
    inputs = LLAMA.inputs()
    base, acting = output(LLAMA.build(), inputs), output(model, inputs)
    model.disable_adapters()
    model.disable_adapters()
    assert torch.equal(output(model, inputs), base)
    model.enable_adapters()
    assert torch.equal(output(model, inputs), acting)
    model.enable_adapters()
    assert model.active_adapters == ["default"]


def test_a_deleted_adapter_is_gone_and_the_others_act_on():
    model, inputs = adapted(), MLP.inputs()
    alone = output(model, inputs)
    model.add_adapter("other", MLP.config(init_lora_weights=False))
    model.set_adapter(["default", "other"])
    assert not torch.equal(output(model, inputs), alone)
    model.delete_adapter("other")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert torch.equal(output(model, inputs), alone)
    assert not any("other" in name for name, _ in model.named_parameters())
    with pytest.raises(AdaptError, match="has no adapter 'other'; it has \\['default'\\]"):
        model.delete_adapter("other")


def test_the_base_model_is_the_model_itself():
    model = adapted()
    assert model.get_base_model() is model


def test_a_safe_merge_refuses_what_is_not_finite():
    model = adapted()
    with torch.no_grad():
        model.head.lora_B_default[0, 0] = torch.nan
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(AdaptError, match=r"change of head\.weight by adapter 'default' isn't finite"):
        model.merge_and_unload(safe_merge=True)
    assert isinstance(model, PeftModel)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if "lora" not in name)


def test_only_safetensors_are_written(tmp_path: Path):
    with pytest.raises(ValueError, match="safetensors only"):
        adapted().save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_an_option_that_does_not_exist_is_an_error(tmp_path: Path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="torch_device: not an option here"):
        PeftModel.from_pretrained(MLP.build(), tmp_path, torch_device="cpu")
    with pytest.raises(TypeError, match="LoraConfig has no option 'lora_alfa'; did you mean 'lora_alpha'"):
        LoraConfig(lora_alfa=8)  # type: ignore[call-arg]


def test_an_adapter_is_found_in_a_subfolder(tmp_path: Path):
    model = adapted("mine")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP.build(), tmp_path, subfolder="mine")
    assert torch.equal(output(loaded, MLP.inputs()), output(model, MLP.inputs()))


def test_tensors_that_are_set_are_reported_as_load_state_dict_does():
    model, other = adapted(), adapted()
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    assert torch.equal(output(other, MLP.inputs()), output(model, MLP.inputs()))
