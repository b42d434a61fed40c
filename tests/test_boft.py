"""BOFT with several factors, which PEFT has with its CUDA kernel alone, with dropout, and on other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import Experts
from oracle import LINEAR, Case, assert_close, assert_same_tensors, moved, outputs
from peft.tuners.boft import layer as their_layer
from safetensors.torch import load_file
from torch import nn

import graphpeft
from graphpeft import AdaptError, BOFTConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:Failed to load the CUDA extension",
    "ignore:Setting boft_n_butterfly_factor to 1",
    "ignore:no gradient goes through",
)
"""PEFT's own warnings, on machines without its kernel."""

WIDE = Case("wide", lambda: nn.Sequential(nn.Linear(24, 5), nn.Tanh()), lambda: (torch.randn(3, 24),))
KERNEL = Case("kernel", lambda: nn.Sequential(nn.Conv2d(4, 6, 2)), lambda: (torch.randn(2, 4, 5, 5),))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives PEFT its kernel, which makes matrices of blocks."""
    monkeypatch.setattr(their_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(
        their_layer.FastBlockDiag, "apply", lambda blocks: torch.stack([torch.block_diag(*each) for each in blocks])
    )


def by_both(case: Case, **options: Any) -> tuple[Any, Any]:
    """Returns two copies of a model, adapted by PEFT and by this library, with equal values."""
    options = {"boft_block_size": 2, "target_modules": ["0"]} | options
    theirs = moved(peft.get_peft_model(case.build(), peft.BOFTConfig(**options)))
    ours: Any = get_peft_model(case.build(), BOFTConfig(**options))
    graphpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours.eval()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("case", "options"),
    [
        (WIDE, {"boft_n_butterfly_factor": 2}),
        (WIDE, {"boft_n_butterfly_factor": 3, "boft_block_size": 0, "boft_block_num": 4}),
        (KERNEL, {"boft_n_butterfly_factor": 3}),
    ],
    ids=str,
)
def test_several_factors_mix_the_features_that_pefts_mix(case: Case, options: dict[str, Any], tmp_path: Path):
    theirs, ours = by_both(case, **options)
    assert_same_tensors(ours, theirs)
    expected = outputs(theirs, case)
    assert_close(outputs(ours, case), expected, 1e-5)
    ours.save_pretrained(tmp_path)
    assert_close(outputs(peft.PeftModel.from_pretrained(case.build(), tmp_path).eval(), case), expected, 1e-5)
    assert_close(outputs(ours.merge_and_unload(), case), outputs(theirs.merge_and_unload(), case), 1e-5)


def test_a_file_of_the_one_factor_that_peft_makes_on_a_cpu_is_read_as_such(tmp_path: Path):
    theirs = moved(peft.get_peft_model(WIDE.build(), peft.BOFTConfig(boft_n_butterfly_factor=3, target_modules=["0"])))
    theirs.save_pretrained(str(tmp_path))
    key = "base_model.model.0.boft_R"
    assert load_file(tmp_path / "adapter_model.safetensors")[key].shape == (1, 6, 4, 4)
    with pytest.raises(
        graphpeft.AdaptError, match="3 butterfly factors need blocks of an even size, and a multiple of"
    ):
        PeftModel.from_pretrained(WIDE.build(), tmp_path)
    theirs = moved(peft.get_peft_model(WIDE.build(), peft.BOFTConfig(boft_n_butterfly_factor=2, target_modules=["0"])))
    theirs.save_pretrained(str(tmp_path))
    ours: Any = PeftModel.from_pretrained(WIDE.build(), tmp_path)
    assert_close(outputs(ours, WIDE), outputs(theirs, WIDE), 1e-5)
    ours.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors")[key].shape == (2, 6, 4, 4)
    again = PeftModel.from_pretrained(WIDE.build(), tmp_path / "again")
    assert torch.equal(outputs(again, WIDE), outputs(ours, WIDE))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", [WIDE, KERNEL], ids=str)
def test_dropout_draws_the_random_numbers_that_pefts_draws(case: Case):
    theirs, ours = by_both(case, boft_n_butterfly_factor=2, boft_dropout=0.4)
    found, (x,) = set(), case.inputs()
    for seed in range(8):
        drawn = []
        for model in (theirs.train(), ours.train()):
            torch.manual_seed(seed)
            drawn.append(model(x))
        assert_close(drawn[1], drawn[0], 1e-5)
        found.add(drawn[1].sum().item())
    assert len(found) > 4
    assert_close(ours.eval()(x), theirs.eval()(x), 1e-5)


def test_each_matrix_of_a_stack_has_a_butterfly_of_its_own():
    config = BOFTConfig(boft_block_size=5, target_modules=["up"])
    assert get_peft_model(Experts(), config).default.up_boft_R.shape == (2, 1, 1, 5, 5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "its 6 features don't fall into blocks by boft_block_size or boft_block_num"),
        ({"boft_block_size": 0, "boft_block_num": 4}, "its 6 features don't fall into blocks by boft_block_size"),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "2 butterfly factors need blocks of an even size"),
        ({"boft_block_size": 2, "boft_n_butterfly_factor": 2}, "a multiple of 2 of them; it has 3 of 2 features"),
    ],
)
def test_features_that_do_not_fall_into_blocks_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(AdaptError, match=reason):
        get_peft_model(LINEAR.build(), BOFTConfig(target_modules=["0"], **options))
