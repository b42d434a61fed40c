"""PSOFT's factors, which follow from the base, beside half precision, merged adapters and on other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.modules import LinearNF4
from models import Experts
from oracle import LINEAR, Case, assert_close, moved, outputs
from quantised import by_bitsandbytes
from torch import nn

import graphpeft
from graphpeft import AdaptError, PeftModel, PsoftConfig, get_peft_model
from graphpeft.sites import quantisers

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through")

OPTIONS: dict[str, Any] = {"r": 3, "psoft_alpha": 2, "target_modules": ["0"]}


@pytest.mark.parametrize("init", ["psoft_init", "pissa_init"])
@pytest.mark.parametrize("svd", ["full", "lowrank"])
def test_the_factors_are_pefts_beside_a_base_in_half_precision(init: Any, svd: Any):
    options: dict[str, Any] = {**OPTIONS, "ab_svd_init": init, "psoft_svd": svd}
    before = torch.random.get_rng_state()
    wrapped: Any = peft.get_peft_model(LINEAR.build().bfloat16(), peft.PsoftConfig(**options))
    theirs = wrapped.base_model.model[0]
    torch.random.set_rng_state(before)
    ours: Any = get_peft_model(LINEAR.build().bfloat16(), PsoftConfig(**options))
    adapter = ours[0].default
    assert adapter.psoft_A.dtype == torch.float32
    assert_close(adapter.psoft_A, theirs._psoft_A_cache["default"])
    assert_close(adapter.psoft_B, theirs._psoft_B_cache["default"])


def test_a_random_decomposition_leaves_the_global_generator_alone():
    torch.manual_seed(8)
    expected = torch.rand(2)
    base = LINEAR.build()
    torch.manual_seed(8)
    get_peft_model(base, PsoftConfig(**OPTIONS, psoft_svd="lowrank"))
    assert torch.equal(torch.rand(2), expected)


def test_an_adapter_that_is_loaded_beside_a_merged_one_has_the_factors_of_the_base(tmp_path: Path):
    model = moved(get_peft_model(LINEAR.build(), PsoftConfig(**OPTIONS)))
    expected = outputs(model, LINEAR)
    model.save_pretrained(tmp_path)
    other: Any = moved(get_peft_model(LINEAR.build(), PsoftConfig(**OPTIONS)), seed=5)
    other.merge_adapter()
    other.load_adapter(tmp_path, "loaded")
    other.unmerge_adapter()
    other.set_adapter("loaded")
    assert torch.equal(outputs(other, LINEAR), expected)
    again = PeftModel.from_pretrained(LINEAR.build(), tmp_path)
    assert torch.equal(outputs(again, LINEAR), expected)


def test_each_matrix_of_a_stack_has_a_subspace_of_its_own():
    config = PsoftConfig(r=2, target_modules=["up"])
    torch.manual_seed(0)
    assert get_peft_model(Experts(), config).default.up_psoft_B.shape == (2, 6, 2)


def test_the_numbers_of_a_quantised_weight_are_decomposed():
    case = Case("nf4", by_bitsandbytes(LinearNF4), lambda: (torch.randn(3, 64),))
    config = PsoftConfig(r=3, target_modules=["0"])
    base, model = case.build(), moved(get_peft_model(case.build(), config))
    plain: Any = nn.Sequential(nn.Linear(64, 64))
    plain[0].load_state_dict({"weight": quantisers.codes_of(base[0]).numbers(), "bias": base[0].bias})  # type: ignore[index]
    same: Any = get_peft_model(plain, config)
    graphpeft.set_peft_model_state_dict(same, graphpeft.get_peft_model_state_dict(model))
    (x,) = case.inputs()
    assert_close(model(x), base[2](torch.tanh(same(x))), 1e-5)  # type: ignore[index]


@pytest.mark.parametrize("options", [{"r": 1}, {"use_cayley_neumann": True, "cayley_neumann_eps": 0.3}], ids=str)
def test_what_has_no_angle_yet_is_trained(options: dict[str, Any]):
    model: Any = get_peft_model(LINEAR.build(), PsoftConfig(**OPTIONS | options))
    model(*LINEAR.inputs()).square().mean().backward()
    gradients = [tensor.grad for tensor in model.parameters() if tensor.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_rank_above_the_weights_is_refused():
    for library in (peft.PsoftConfig, PsoftConfig):
        make = peft.get_peft_model if library is peft.PsoftConfig else get_peft_model
        with pytest.raises((ValueError, AdaptError), match=r"r`? ?\(?=?7\)? (must be less than|is above the rank)"):
            make(LINEAR.build(), library(r=7, target_modules=["0"]))  # type: ignore[operator]
