"""RandLoRA's files, which have copies of the projections or not, and its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from matrix_uses import TARGETS, build, inputs
from oracle import moved
from safetensors.torch import load_file, save_file

import graphpeft
from graphpeft import AdaptError, CheckpointError, PeftModel, RandLoraConfig, get_peft_model
from graphpeft.methods.randlora import scaled_bases

WEIGHTS = "adapter_model.safetensors"


def saved_by(library: Any, folder: Path) -> Any:
    torch.manual_seed(2)
    config = library.RandLoraConfig(r=3, randlora_alpha=5, target_modules=TARGETS)
    model = moved(library.get_peft_model(build(), config))
    model.save_pretrained(str(folder))
    return model


def copies_in(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [key for key in tensors if key.endswith(("randlora_A", "randlora_B")) and key.count(".") > 1]


@pytest.mark.parametrize("library", [peft, graphpeft], ids=["theirs", "ours"])
def test_files_without_copies_of_the_projections_are_read_and_written_with_them(library: Any, tmp_path: Path):
    expected = saved_by(library, tmp_path)(inputs())
    whole = load_file(tmp_path / WEIGHTS)
    assert len(copies_in(whole)) == 2 * len(TARGETS)
    save_file({key: whole[key] for key in whole if key not in copies_in(whole)}, tmp_path / WEIGHTS)
    model: Any = PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(model(inputs()), expected)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_a_copy_with_other_values_is_refused(tmp_path: Path):
    saved_by(peft, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[copies_in(tensors)[2]] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"other values in .*\.2\.randlora_A than in base_model\.randlora_A"):
        PeftModel.from_pretrained(build(), tmp_path)


def test_a_file_of_copies_alone_is_refused(tmp_path: Path):
    saved_by(peft, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["base_model.randlora_A"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"lacks base_model\.randlora_A"):
        PeftModel.from_pretrained(build(), tmp_path)


def test_another_adapter_with_another_seed_is_refused():
    model: Any = get_peft_model(build(), RandLoraConfig(r=3, target_modules=TARGETS))
    with pytest.raises(AdaptError, match="projection_prng_key is 4, and 0 of the adapter 'default'"):
        model.add_adapter("other", RandLoraConfig(r=3, target_modules=TARGETS, projection_prng_key=4))


def test_a_state_dict_names_the_modules_and_not_the_projections(tmp_path: Path):
    saved_by(graphpeft, tmp_path)
    config = RandLoraConfig(r=3, target_modules=["none"])
    model: Any = graphpeft.inject_adapter_in_model(config, build(), state_dict=load_file(tmp_path / WEIGHTS))
    assert sorted(status.name for status in model.get_layer_status()) == TARGETS


def test_the_bases_keep_for_their_backward_what_they_are_made_of():
    base, scale, gamma = torch.randn(3, 1, 64), torch.randn(3, 22), torch.randn(22, 64)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        scaled_bases(base, scale.requires_grad_(), gamma.requires_grad_())
    assert sum(kept) <= base.numel() + scale.numel() + gamma.numel()


def test_the_bases_have_gradients_of_any_order():
    base = torch.randn(2, 1, 5, dtype=torch.double)
    scale, gamma = (torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((4, 2, 3), (4, 3, 5)))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda s, g: scaled_bases(base, s, g), (scale, gamma))
