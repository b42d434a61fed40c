"""Block-diagonal LoRA on whole models beside PEFT's, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import LLAMA
from oracle import LINEAR, TRANSPOSED, Case, assert_close, moved, outputs
from safetensors.torch import load_file
from torch import Tensor

import graphpeft
from graphpeft import AdaptError, BdLoraConfig, LoraConfig, PeftModel, get_peft_model

OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj", "up_proj"]}
BLOCKS: dict[str, Any] = {
    "target_modules_bd_a": ["q_proj"],
    "target_modules_bd_b": ["mlp.down"],
    "nblocks": 2,
    "match_strict": False,
}
"""Blocks of A, of B, and of neither."""


def config(library: Any, **options: Any) -> Any:
    return library.LoraConfig(**OPTIONS | {"use_bdlora": library.BdLoraConfig(**BLOCKS)} | options)


def logits(model: Any, **options: Any) -> Tensor:
    ids = torch.randint(3, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init_lora_weights", [True, False, "gaussian"])
def test_a_llama_has_pefts_values_outputs_and_files(init_lora_weights: Any, dtype: torch.dtype, tmp_path: Path):
    following, models = [], []
    for library in (peft, graphpeft):
        base = LLAMA.build().to(dtype)
        torch.manual_seed(7)
        models.append(library.get_peft_model(base, config(library, init_lora_weights=init_lora_weights)))  # type: ignore[attr-defined]
        following.append(torch.rand(2))
        models[-1].save_pretrained(str(tmp_path / library.__name__))
    assert torch.equal(*following)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("graphpeft", "peft"))
    assert {key: tensor.dtype for key, tensor in ours.items()} == {key: t.dtype for key, t in theirs.items()}
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    moved(models[0]).save_pretrained(str(tmp_path / "moved"))
    model = PeftModel.from_pretrained(LLAMA.build().to(dtype), tmp_path / "moved").eval()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert_close(logits(model), logits(models[0]), tolerance)
    if dtype == torch.float32:
        expected = logits(model)
        assert_close(logits(model.merge_and_unload()), expected, 1e-5)
        model = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "moved")
        model.save_pretrained(tmp_path / "again")
        again = peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "again")).eval()
        assert_close(logits(again), expected, 1e-5)


def test_adapters_of_several_numbers_of_blocks_and_ranks_are_mixed_and_not_combined():
    model: Any = get_peft_model(LLAMA.build(), config(graphpeft))
    model.add_adapter("second", config(graphpeft, use_bdlora=BLOCKS | {"nblocks": 4}))
    model.add_adapter("third", config(graphpeft, r=6))
    alone: dict[str, Tensor] = {"__base__": logits(LLAMA.build())}
    for seed, name in enumerate(("default", "second", "third")):
        model.set_adapter(name)
        alone[name] = logits(moved(model, seed))
    for rows in (["default", "third", "__base__"], ["default", "second", "third"]):
        found = logits(model, adapter_names=rows)
        for row, name in enumerate(rows):
            torch.testing.assert_close(found[row], alone[name][row], atol=1e-5, rtol=1e-4)
    with pytest.raises(AdaptError, match="BD-LoRA is more than a product of A and B"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum", combination_type="linear")


@pytest.mark.parametrize(
    ("case", "blocks", "options", "reason"),
    [
        (LINEAR, {}, {}, "neither of target_modules_bd_a and target_modules_bd_b of use_bdlora have a text"),
        (LINEAR, {"target_modules_bd_a": ["0"], "target_modules_bd_b": [""]}, {}, "both of target_modules"),
        (LINEAR, {"target_modules_bd_a": ["0"], "nblocks": 4}, {}, "nblocks=4, which doesn't divide its 6 inputs"),
        (LINEAR, {"target_modules_bd_b": ["0"], "nblocks": 3}, {}, "nblocks=3, which doesn't divide its 8 outputs"),
        (LINEAR, {"target_modules_bd_a": ["0"], "nblocks": 3}, {}, "nblocks=3, which doesn't divide the rank 4"),
        (LINEAR, {"target_modules_bd_a": ["0"]}, {"init_lora_weights": "pissa"}, "gives whole factors"),
        (LINEAR, {"target_modules_bd_b": ["0"]}, {"lora_bias": True}, "lora_bias=True isn't for a B of blocks"),
        (TRANSPOSED, {"target_modules_bd_a": ["0"]}, {}, "it is a Conv1D, and use_bdlora is for nn.Linear"),
    ],
)
def test_what_cannot_be_is_refused(case: Case, blocks: dict[str, Any], options: dict[str, Any], reason: str):
    model = case.build()
    expected = outputs(model, case)
    with pytest.raises(AdaptError, match=reason):
        get_peft_model(model, LoraConfig(r=4, use_bdlora=blocks, **case.targets, **options))
    assert torch.equal(outputs(model, case), expected)


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="target_modules_bd_a and target_modules_bd_b both name 'q'"):
        BdLoraConfig(target_modules_bd_a=["q"], target_modules_bd_b=["q"])
    with pytest.raises(ValueError, match="use_bdlora: nblocks must be a positive integer"):
        LoraConfig(use_bdlora={"nblocks": 0})
    with pytest.raises(ValueError, match=r"use_bdlora=.* can't go with use_dora=True"):
        LoraConfig(use_bdlora=BLOCKS, use_dora=True)
    with pytest.raises(ValueError, match=r"alora_invocation_tokens=\[1\] can't go with use_bdlora="):
        LoraConfig(use_bdlora=BLOCKS, alora_invocation_tokens=[1])
