"""The pass that draws the mask of a branch's dropout again in the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import body_of
from torch import nn

from graphpeft import LoraConfig, get_peft_model, optimize
from graphpeft.passes.products import product
from graphpeft.testing.memory import kept_bytes

pytestmark = pytest.mark.quick("passes")

TOKENS, FEATURES = 32, 64


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], lora_dropout=0.4, init_lora_weights=False, **options)
    return get_peft_model(nn.Sequential(nn.Linear(FEATURES, FEATURES)), config).train()


def test_a_branch_keeps_its_input_and_neither_the_mask_nor_what_it_leaves():
    plain, regenerated = layer(), layer()
    report = optimize(regenerated, ["regenerated_dropout"])
    assert report.changed == {"regenerated_dropout": ("0",)}
    given = "input_1, input_1, slot0_lora_a_1, slot0_lora_dropout_p, slot0_lora_dropout_training"
    assert f"product = product({given})" in body_of(regenerated[0])
    x, down = torch.randn(TOKENS, FEATURES, requires_grad=True), 4 * TOKENS * 2
    assert kept_bytes(lambda: plain(x).sum()) == 2 * x.nbytes + down
    assert kept_bytes(lambda: regenerated(x).sum()) == down + torch.get_rng_state().nbytes


def test_a_seed_gives_the_bits_that_it_gave():
    plain, regenerated = layer(), layer()
    optimize(regenerated, ["regenerated_dropout"])
    x = torch.randn(TOKENS, FEATURES)
    found = []
    for model in (plain, regenerated):
        torch.manual_seed(1)
        found.append((model(x), model(x), torch.get_rng_state()))
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], found[0][1])


def test_the_backward_leaves_the_random_numbers_to_come():
    model = layer()
    optimize(model, ["regenerated_dropout"])
    torch.manual_seed(1)
    y = model(torch.randn(TOKENS, FEATURES, requires_grad=True))
    torch.rand(3)  # or drawing the mask again would itself leave the state that it found
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_two_calls_before_one_backward_have_masks_of_their_own():
    plain, regenerated = layer(), layer()
    optimize(regenerated, ["regenerated_dropout"])
    x = torch.randn(TOKENS, FEATURES)
    for model in (plain, regenerated):
        torch.manual_seed(1)
        (model(x) * model(x + 1)).sum().backward()
    assert torch.equal(regenerated[0].default.lora_A.grad, plain[0].default.lora_A.grad)


def test_a_mask_of_what_was_cast_is_drawn_again_as_exactly():
    def half() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["0"], lora_dropout=0.4, init_lora_weights=False)
        return get_peft_model(nn.Sequential(nn.Linear(FEATURES, FEATURES)).bfloat16(), config).train()

    plain, regenerated = half(), half()
    optimize(regenerated, ["regenerated_dropout", "recomputed_casts"])
    x = torch.randn(TOKENS, FEATURES, dtype=torch.bfloat16)
    for model in (plain, regenerated):
        torch.manual_seed(1)
        model(x).float().square().sum().backward()
    assert torch.equal(regenerated[0].default.lora_A.grad, plain[0].default.lora_A.grad)


def test_a_backward_under_autocast_computes_in_the_dtypes_of_the_forward():
    x, gradients = torch.randn(TOKENS, FEATURES), []
    for is_on in (False, True):
        torch.manual_seed(1)
        A = torch.randn(2, FEATURES, requires_grad=True)
        d = product(x, x, A, 0.4, True)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            d.sum().backward()
        gradients.append(A.grad)
    assert torch.equal(*gradients)


def test_evaluation_draws_nothing():
    model = layer().eval()
    optimize(model, ["regenerated_dropout"])
    before = torch.get_rng_state()
    x = torch.randn(TOKENS, FEATURES)
    assert torch.equal(model(x), layer().eval()(x))
    torch.set_rng_state(before)
    model(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_dropout_leaves_for_others_is_kept():
    report = optimize(layer(use_dora=True), ["regenerated_dropout"])
    assert report.left["regenerated_dropout"] == {"0": "several nodes read the output of dropout"}
