"""LoftQ's first values are PEFT's, which needs bitsandbytes and a GPU for them; here its code runs on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from measuring import let_peft_round_on_the_cpu
from models import LLAMA
from oracle import (
    LINEAR,
    MATRICES,
    TRANSPOSED,
    Case,
    assert_close,
    assert_files_go_both_ways,
    assert_merges_and_unloads,
    assert_same_tensors,
    assert_trains_alike,
    by_peft,
    by_us,
    config,
    outputs,
    perturb,
    tensors,
)
from torch import nn

import graphpeft
from graphpeft import AdaptError, LoftQConfig, own_weight
from graphpeft.testing import laws

# what PEFT and bitsandbytes warn of is theirs
pytestmark = pytest.mark.filterwarnings("ignore")

WIDE = Case("wide", lambda: nn.Sequential(nn.Linear(96, 80)), lambda: (torch.randn(3, 96),), {"target_modules": ["0"]})
# PEFT decomposes the weight of a Conv1D as it is stored, which fits no A and B
CASES = [*(case for case in MATRICES if case is not TRANSPOSED), WIDE, LLAMA]
OPTIONS: list[dict[str, Any]] = [
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": bits, "loftq_iter": steps}}
    for bits in (4, 8)
    for steps in (1, 3)
]
each = pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}-{tuple(options['loftq_config'].values())}")
        for case in CASES
        for options in OPTIONS
    ],
)


@pytest.fixture(autouse=True)
def _peft_rounds_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    let_peft_round_on_the_cpu(monkeypatch)


def pair(case: Any, options: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """Returns the model adapted by both libraries, with equal values other than the first."""
    ours, theirs = by_us(case, **options, **more), by_peft(case, **options, **more)
    perturb(theirs)
    graphpeft.set_peft_model_state_dict(ours, tensors(theirs))
    return ours, theirs


@each
def test_first_values_and_the_rounded_weight_are_pefts(case: Any, options: dict[str, Any]) -> None:
    ours, theirs = by_us(case, **options), by_peft(case, **options)
    assert_same_tensors(ours, theirs, 1e-5)
    assert_close(outputs(ours, case), outputs(theirs, case), 1e-5)
    assert (outputs(ours, case) - outputs(case.build(), case)).abs().max() > 1e-5


@each
def test_outputs_gradients_and_files_are_pefts(case: Any, options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(case, options, lora_dropout=0.3)
    assert_close(outputs(ours, case), outputs(theirs, case))
    assert_trains_alike(ours, theirs, case)
    assert_files_go_both_ways(ours, theirs, case, tmp_path)


@each
def test_merged_is_pefts_and_unloaded_is_the_base(case: Any, options: dict[str, Any]) -> None:
    ours, theirs = pair(case, options)
    assert_merges_and_unloads(ours, theirs, case)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_read_has_no_more_values_than_the_bits_hold(bits: int) -> None:
    options = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(bits, 1)}
    weight = own_weight(by_us(WIDE, **options)[0])
    blocks = weight.view(-1, 64) if bits == 4 else weight
    assert all(len(block.unique()) <= 2**bits for block in blocks)
    assert len(weight.unique()) > 2**bits


@pytest.mark.parametrize("bits", [4, 8])
def test_more_steps_leave_less_out(bits: int) -> None:
    def error(steps: int) -> float:
        model = by_us(WIDE, init_lora_weights="loftq", loftq_config=LoftQConfig(bits, steps), r=16, lora_alpha=16)
        base: Any = WIDE.build()
        return float((model.merge_and_unload()[0].weight - base[0].weight).norm())

    plain: Any = WIDE.build()
    rounded = error(1)
    assert error(5) < rounded < plain[0].weight.norm()


def test_the_base_keeps_its_weight() -> None:
    model = by_us(WIDE, **OPTIONS[0])
    base: Any = WIDE.build()
    assert not torch.equal(model[0].weight, base[0].weight)
    assert torch.equal(model.unload()[0].weight, base[0].weight)


def test_a_weight_of_zeros_stays_zero() -> None:
    for options in OPTIONS:
        model: Any = nn.Sequential(nn.Linear(70, 5))
        nn.init.zeros_(model[0].weight)
        model = graphpeft.get_peft_model(model, config(WIDE, **options))
        assert torch.equal(model[0].weight, torch.zeros(5, 70))


def test_the_config_is_pefts_json(tmp_path: Path) -> None:
    ours, theirs = pair(LINEAR, OPTIONS[0])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    read = [peft.LoraConfig.from_pretrained(str(tmp_path / name)).to_dict() for name in ("ours", "theirs")]
    assert read[0]["loftq_config"] == read[1]["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "loftq"}, "needs loftq_config, such as"),
        ({**OPTIONS[0], "loftq_config": {"loftq_bits": 2}}, "loftq_bits must be 4 or 8"),
        ({**OPTIONS[0], "loftq_config": {"loftq_bits": 4, "loftq_iter": 0}}, "loftq_iter must be a positive integer"),
        ({**OPTIONS[0], "loftq_config": {"bits": 4}}, "loftq_config has no option 'bits'"),
        ({**OPTIONS[0], "r": 7}, "its rank is 6 at most, and r is 7"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(options: dict[str, Any], words: str) -> None:
    model = LINEAR.build()
    before = laws.snapshot(model)
    with pytest.raises((AdaptError, ValueError), match=words):
        graphpeft.get_peft_model(model, config(LINEAR, **options))
    laws.require_unchanged(model, before, "a refused adaptation")


def test_what_was_rounded_away_is_no_plain_lora(tmp_path: Path) -> None:
    model = by_us(LINEAR, **OPTIONS[0])
    model.save_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match="'default' took none when it was made"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "first")
