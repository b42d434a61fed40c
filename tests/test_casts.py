"""The passes on casts: those that several branches read are made once, and again in the backward."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from blocks import block, body_of, inputs
from torch import nn

from graphpeft import LoraConfig, get_peft_model, optimize
from graphpeft.testing.memory import kept_bytes

pytestmark = pytest.mark.quick("passes")

TOKENS, FEATURES = 32, 64


def test_branches_of_one_input_share_its_cast():
    model = block("flat", torch.bfloat16, target_modules=["q", "k"])
    optimize(model, ["shared_casts"])
    of_inputs = [line for line in body_of(model) if "tanh" in line and ("to(" in line or "cast_again" in line)]
    assert [re.sub(r"getattr_\d", "dtype", line) for line in of_inputs] == [
        "to = tanh.to(dtype)",
        "cast_again = cast_again(to, tanh, dtype)",
    ]


def test_matrices_of_other_dtypes_get_casts_of_their_own():
    plain, shared = (block("flat", torch.bfloat16, target_modules=["q", "k"]) for _ in range(2))
    optimize(shared, ["shared_casts"])
    for model in (plain, shared):
        model.k.double()
        model.k.weight.data = model.k.weight.data.bfloat16()
    assert torch.equal(shared(inputs(torch.bfloat16)), plain(inputs(torch.bfloat16)))


def test_a_cast_of_what_was_written_into_is_another():
    model = block("flat", torch.bfloat16, target_modules=["q", "k"])
    tanh = next(node for node in model.graph.nodes if node.name == "tanh")
    k = next(node for node in model.graph.nodes if node.op == "call_module" and node.target == "k")
    with model.graph.inserting_before(k):
        model.graph.call_method("add_", (tanh, 1))
    model.recompile()
    assert optimize(model, ["shared_casts"]).changed == {"shared_casts": ()}


def layer() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES)).bfloat16()
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))


def test_a_layer_keeps_its_input_and_not_the_cast_of_it():
    plain, recomputed = layer(), layer()
    report = optimize(recomputed, ["recomputed_casts"])
    assert report.changed == {"recomputed_casts": ("0",)}
    assert "product = product(input_1, to, slot0_lora_a_1)" in body_of(recomputed[0])
    x = torch.randn(TOKENS, FEATURES, dtype=torch.bfloat16, requires_grad=True)
    cast, down = 4 * TOKENS * FEATURES, 4 * TOKENS * 2
    assert kept_bytes(lambda: plain(x).sum()) == cast + down
    assert kept_bytes(lambda: recomputed(x).sum()) == down


def test_an_input_that_is_written_into_before_the_backward_is_an_error():
    model = layer()
    optimize(model, ["recomputed_casts"])
    x = torch.randn(TOKENS, FEATURES, dtype=torch.bfloat16)
    y = model(x).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_cast_below_dropout_goes_with_the_dropout():
    def adapted() -> Any:
        model = nn.Sequential(nn.Linear(FEATURES, FEATURES)).bfloat16()
        return get_peft_model(model, LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1)).train()

    report = optimize(adapted(), ["recomputed_casts"])
    assert report.left["recomputed_casts"]["0"].startswith("dropout is between the cast and the product")
    model = adapted()
    report = optimize(model, ["recomputed_casts", "regenerated_dropout"])
    assert report.changed["recomputed_casts"] == ("0",)
    x = torch.randn(TOKENS, FEATURES, dtype=torch.bfloat16, requires_grad=True)
    assert kept_bytes(lambda: model(x).sum()) == 4 * TOKENS * 2 + torch.get_rng_state().nbytes


def test_models_in_single_precision_have_no_casts():
    report = optimize(block("regions"), ["shared_casts", "recomputed_casts"])
    assert "recomputed_casts finds nothing: there are no products of casts" in str(report)
