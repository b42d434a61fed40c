"""Models that PyTorch wrapped first, and that were adapted then: the adapters are the wrapper's, as PEFT's are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graphpeft import LoraConfig, PeftModel, check_learning, get_model_status, get_peft_model
from graphpeft import get_peft_model_state_dict as state_dict_of

WRAPPERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "DataParallel": (nn.DataParallel, "module"),
    "compiled": (lambda model: torch.compile(model, backend="eager"), "_orig_mod"),
}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_that_was_adapted_is_checked_saved_and_loaded(kind: str, tmp_path: Path):
    wrap, inside = WRAPPERS[kind]
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model, x = get_peft_model(wrap(base()), config), torch.randn(4, 3)
    expected = model(x)
    assert not torch.equal(expected, base()(x))
    assert not check_learning(model, (x,)).dead
    assert get_model_status(model).active_adapters == ["default"]
    names = {f"base_model.model.{inside}.0.lora_{factor}.weight" for factor in "AB"}
    assert state_dict_of(model).keys() == names
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == names
    torch.testing.assert_close(PeftModel.from_pretrained(wrap(base()), tmp_path)(x), expected)
    theirs: Any = peft.PeftModel.from_pretrained(wrap(base()), str(tmp_path))
    torch.testing.assert_close(theirs(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_adapters_inside_of_a_wrapper_are_found(kind: str):
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    wrapped, x = WRAPPERS[kind][0](model), torch.randn(4, 3)
    assert not check_learning(wrapped, (x,)).dead
    assert state_dict_of(wrapped).keys() == state_dict_of(model).keys()


def test_what_is_compiled_in_its_place_is_checked_without_a_compiler():
    model: Any = get_peft_model(base(), LoraConfig(r=2, target_modules=["0", "2"]))
    model[0].compile(backend="eager")
    model.compile(backend="eager")
    assert not check_learning(model, (torch.randn(4, 3),)).dead
