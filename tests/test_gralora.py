"""GraLoRA on whole models, and its sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import BERT, GPT2, LLAMA, Example, output
from oracle import perturb
from torch import nn

from graphpeft import AdaptError, GraloraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through", "ignore:::peft")

HYBRID: dict[str, Any] = {"r": 6, "hybrid_r": 2, "gralora_k": 2, "alpha": 5}


@pytest.mark.parametrize(("example", "bias"), [(LLAMA, "none"), (GPT2, "all"), (BERT, "gralora_only")], ids=str)
def test_files_of_whole_models_with_trained_biases_go_both_ways(example: Example, bias: str, tmp_path: Path):
    options: dict[str, Any] = HYBRID | example.lora | {"bias": bias}
    theirs: Any = peft.get_peft_model(example.build(), peft.GraloraConfig(**options)).eval()
    perturb(theirs)
    expected = output(theirs, example.inputs())
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours: Any = PeftModel.from_pretrained(example.build(), tmp_path / "theirs")
    torch.testing.assert_close(output(ours, example.inputs()), expected, atol=1e-5, rtol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(example.build(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(output(again, example.inputs()), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 5, 6)], ids=str)
def test_an_input_may_have_any_number_of_dimensions(shape: tuple[int, ...]):
    # PEFT takes two or three
    torch.manual_seed(0)
    layer = nn.Linear(6, 8)
    model: Any = get_peft_model(nn.Sequential(layer), GraloraConfig(target_modules=["0"], init_weights=False, **HYBRID))
    x = torch.randn(shape)
    active = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), active)


def test_blocks_of_rank_one_are_what_their_equation_says():
    torch.manual_seed(0)
    layer = nn.Linear(6, 8, bias=False)
    before = layer.weight.detach().clone()
    config = GraloraConfig(r=2, gralora_k=2, alpha=3, init_weights=False, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(layer), config)
    A, B = model[0].default.gralora_A, model[0].default.gralora_B
    change = model.merge_and_unload()[0].weight - before
    for m in range(2):
        for n in range(2):
            block = change[4 * m : 4 * m + 4, 3 * n : 3 * n + 3]
            torch.testing.assert_close(block, 1.5 * torch.outer(B[m, n], A[n, :, m]))


def test_sizes_that_k_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="gralora_k=3 must divide r=4"):
        GraloraConfig(r=4, gralora_k=3)
    for layer, reason in ((nn.Linear(7, 8), "its 7 inputs"), (nn.Linear(8, 7), "its 7 outputs")):
        with pytest.raises(AdaptError, match=f"gralora_k=2 doesn't divide {reason}"):
            get_peft_model(nn.Sequential(layer), GraloraConfig(r=4, target_modules=["0"]))
    with pytest.raises(AdaptError, match="GRALORA isn't for weights of the kind Convolution"):
        get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3)), GraloraConfig(r=4, target_modules=["0"]))
