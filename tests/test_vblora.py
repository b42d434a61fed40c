"""VB-LoRA's bank, and its files that have the top k alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from matrix_uses import TARGETS, build, inputs
from oracle import moved
from safetensors.torch import load_file, save_file
from torch import nn

import graphpeft
from graphpeft import AdaptError, CheckpointError, PeftModel, VBLoRAConfig, get_peft_model, get_peft_model_state_dict

WEIGHTS = "adapter_model.safetensors"


def adapted(library: Any = graphpeft, **options: Any) -> Any:
    options = {"r": 3, "num_vectors": 9, "vector_length": 2, "init_vector_bank_bound": 0.5} | options
    torch.manual_seed(2)
    return library.get_peft_model(build(), library.VBLoRAConfig(target_modules=TARGETS, **options))


def test_all_layers_train_one_bank_which_files_have_once():
    model = adapted()
    banks = {model.get_submodule(path).default.vblora_vector_bank for path in TARGETS}
    assert len(banks) == 1
    assert all(bank.requires_grad for bank in banks)
    assert "base_model.vblora_vector_bank" in get_peft_model_state_dict(model)
    model(inputs()).sum().backward()
    assert banks.pop().grad.count_nonzero() > 2  # of more than one vector


@pytest.mark.every
@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"topk": 1}, torch.uint8), ({"topk": 3}, torch.uint8), ({"num_vectors": 300}, torch.int16)],
    ids=str,
)
def test_files_of_the_top_k_go_both_ways(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path):
    shapes = []
    for saver, loader in ((peft, graphpeft), (graphpeft, peft), (graphpeft, graphpeft)):
        folder = tmp_path / f"{saver.__name__} {loader.__name__}"
        model = moved(adapted(saver, save_only_topk_weights=True, **options))
        model.save_pretrained(str(folder))
        loaded = loader.PeftModel.from_pretrained(build(), str(folder)).eval()
        torch.testing.assert_close(loaded(inputs()), model(inputs()))
        written = load_file(folder / WEIGHTS)
        shapes.append({key: (tensor.shape, tensor.dtype) for key, tensor in written.items()})
        loaded.save_pretrained(str(folder / "again"))
        again = load_file(folder / "again" / WEIGHTS)
        torch.testing.assert_close(again, written)
    assert shapes[0] == shapes[1]
    assert shapes[0]["base_model.model.0.vblora_logits_A_topk_indices"][1] == dtype


def test_what_was_saved_so_is_merged_and_is_not_trained_on(tmp_path: Path):
    model = moved(adapted(save_only_topk_weights=True))
    expected = model(inputs())
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    with pytest.raises(RuntimeError, match="saved with save_only_topk_weights=True can't be trained on"):
        loaded.train()(inputs())
    torch.testing.assert_close(loaded.eval().merge_and_unload()(inputs()), expected)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda tensors, key: tensors[f"{key}_topk_indices"].fill_(9), "has places beyond the 9 vectors"),
        (lambda tensors, key: tensors.pop(f"{key}_topk_weights"), r"lacks .*0\.vblora_logits_A.* no place for"),
        (
            lambda tensors, key: tensors.update({f"{key}_topk_indices": tensors[f"{key}_topk_indices"].float()}),
            "don't belong together",
        ),
    ],
    ids=["place", "lacking", "kind"],
)
def test_damaged_files_of_the_top_k_are_refused(damage: Any, reason: str, tmp_path: Path):
    adapted(save_only_topk_weights=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors, "base_model.model.0.vblora_logits_A")
    save_file(tensors, tmp_path / WEIGHTS)
    model = build()
    with pytest.raises(CheckpointError, match=reason):
        PeftModel.from_pretrained(model, tmp_path)
    assert type(model) is type(build())


def test_what_no_vector_fits_is_refused():
    with pytest.raises(AdaptError, match="its 6 input features are no multiple of vector_length=4"):
        get_peft_model(nn.Sequential(nn.Linear(6, 8)), VBLoRAConfig(vector_length=4, target_modules=["0"]))
    with pytest.raises(AdaptError, match="its 6 output features are no multiple of vector_length=4"):
        get_peft_model(nn.Sequential(nn.Linear(8, 6)), VBLoRAConfig(vector_length=4, target_modules=["0"]))
    with pytest.raises(ValueError, match="topk=3 vectors can't be mixed out of num_vectors=2"):
        VBLoRAConfig(topk=3, num_vectors=2)
