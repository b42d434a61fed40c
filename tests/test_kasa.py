"""KaSA on whole models beside PEFT's, its penalty, and what it refuses."""

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
from graphpeft import AdaptError, LoraConfig, PeftModel, get_peft_model, kasa_loss

OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}


def config(library: Any, **options: Any) -> Any:
    return library.LoraConfig(**OPTIONS | {"kasa_config": library.KasaConfig(beta=0.1, gamma=0.2)} | options)


def logits(model: Any, **options: Any) -> Tensor:
    ids = torch.randint(3, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_llama_has_pefts_values_outputs_and_files(dtype: torch.dtype, tmp_path: Path):
    following, models = [], []
    for library in (peft, graphpeft):
        base = LLAMA.build().to(dtype)
        torch.manual_seed(7)
        models.append(library.get_peft_model(base, config(library)).eval())  # type: ignore[attr-defined]
        following.append(torch.rand(2))
        models[-1].save_pretrained(str(tmp_path / library.__name__))
    assert torch.equal(*following)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("graphpeft", "peft"))
    assert {key: tensor.dtype for key, tensor in ours.items()} == {key: t.dtype for key, t in theirs.items()}
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert torch.equal(logits(models[1]), logits(models[0]))  # of the truncated weights
    moved(models[0]).save_pretrained(str(tmp_path / "moved"))
    model = PeftModel.from_pretrained(LLAMA.build().to(dtype), tmp_path / "moved").eval()
    assert_close(logits(model), logits(models[0]), 1e-5 if dtype == torch.float32 else 5e-2)
    if dtype == torch.float32:
        expected = logits(model)
        model.save_pretrained(tmp_path / "again")
        again = peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "again")).eval()
        assert_close(logits(again), expected, 1e-5)
        assert_close(logits(model.merge_and_unload()), logits(models[0].merge_and_unload()), 1e-5)


def test_the_base_keeps_its_weights():
    model: Any = moved(get_peft_model(LLAMA.build(), config(graphpeft)))
    found, base = logits(model), logits(LLAMA.build())
    assert not torch.allclose(found, base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    with pytest.raises(AdaptError, match=r"can't be merged in place; leave it active, or call merge_and_unload"):
        model.merge_adapter()
    assert torch.equal(logits(model), found)
    assert torch.equal(logits(model.unload()), base)


def test_the_penalty_and_its_gradients_are_pefts(tmp_path: Path):
    theirs: Any = moved(peft.get_peft_model(LLAMA.build(), config(peft)))
    theirs.save_pretrained(str(tmp_path))
    ours: Any = PeftModel.from_pretrained(LLAMA.build(), tmp_path, is_trainable=True)
    expected, found = theirs.base_model._get_kasa_loss(), kasa_loss(ours)
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        for loss, model in ((expected, theirs), (found, ours))
    ]
    torch.testing.assert_close(*gradients)
    ours.add_adapter("plain", LoraConfig(**OPTIONS))
    ours.set_adapter("plain")
    assert kasa_loss(ours) == 0
    torch.testing.assert_close(kasa_loss(ours, "default"), expected)


@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        (LINEAR, {"r": 6}, "kasa_config takes r=6 singular values away, and it has 6"),
        (LINEAR, {"init_lora_weights": "pissa"}, "changes A or the weight, as kasa_config does"),
        (TRANSPOSED, {}, "it is a Conv1D, and kasa_config is for nn.Linear"),
    ],
)
def test_what_cannot_be_is_refused(case: Case, options: dict[str, Any], reason: str):
    model = case.build()
    expected = outputs(model, case)
    with pytest.raises(AdaptError, match=reason):
        get_peft_model(model, LoraConfig(**{"r": 2, "kasa_config": {}, **case.targets, **options}))
    assert torch.equal(outputs(model, case), expected)


def test_its_weights_are_not_negative():
    with pytest.raises(ValueError, match="kasa_config: gamma must be a finite number from 0 on"):
        LoraConfig(kasa_config={"gamma": -1.0})
