"""HRA's reflections, where PEFT's fresh adapter is noise, and on weights that PEFT doesn't adapt."""

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

from graphpeft import AdaptError, HRAConfig, PeftModel, get_peft_model
from graphpeft.methods.hra import orthonormal, reflected
from graphpeft.sites import quantisers

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through")


def test_a_chain_is_the_product_of_its_reflections_in_both_orders():
    torch.manual_seed(0)
    u, x = torch.randn(7, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    product = torch.eye(7, dtype=torch.float64)
    for vector in (u / u.norm(dim=0)).T:
        product = product @ (torch.eye(7, dtype=torch.float64) - 2 * torch.outer(vector, vector))
    torch.testing.assert_close(reflected(x, u, False, False), x @ product)
    torch.testing.assert_close(reflected(x, u, False, True), x @ product.T)
    q = orthonormal(u)
    torch.testing.assert_close(q.T @ q, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(q @ (q.T @ u), u)


def test_orthonormal_vectors_out_of_equal_pairs_are_refused_where_pefts_fresh_adapter_is_noise(tmp_path: Path):
    base = LINEAR.build()
    theirs = peft.get_peft_model(LINEAR.build(), peft.HRAConfig(r=4, apply_GS=True, target_modules=["0"]))
    assert (outputs(theirs, LINEAR) - outputs(base, LINEAR)).abs().max() > 0.1
    with pytest.raises(AdaptError, match="apply_GS makes its vectors orthonormal; of each two that are equal"):
        get_peft_model(base, HRAConfig(r=4, apply_GS=True, target_modules=["0"]))
    # what PEFT has trained from there is an adapter as any other
    moved(theirs).save_pretrained(str(tmp_path))
    assert_close(outputs(PeftModel.from_pretrained(base, tmp_path), LINEAR), outputs(theirs, LINEAR), 1e-5)


def test_each_matrix_of_a_stack_has_reflections_of_its_own():
    config = HRAConfig(r=2, target_modules=["up"])
    assert get_peft_model(Experts(), config).default.up_hra_u.shape == (2, 5, 2)


@pytest.mark.filterwarnings("ignore:adapters are merged into the quantised weights")
def test_the_inputs_of_quantised_layers_are_reflected():
    case = Case("nf4", by_bitsandbytes(LinearNF4), lambda: (torch.randn(3, 64),))
    model: Any = moved(get_peft_model(case.build(), HRAConfig(r=2, target_modules=["0"])))
    base: Any = case.build()
    (x,) = case.inputs()
    turned = reflected(x, model[0].default.hra_u, False, True)
    assert_close(outputs(model, case), base(turned), 1e-5)
    expected = reflected(quantisers.codes_of(base[0]).numbers(), model[0].default.hra_u.detach(), False, False)
    model.merge_adapter()
    merged = quantisers.codes_of(model[0]).numbers()
    torch.testing.assert_close(merged, quantisers.quantised(base[0], expected).numbers())
