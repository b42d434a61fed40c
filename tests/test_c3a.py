"""C³A: circulant blocks, two adapters at once, and sizes that don't fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import LINEAR
from torch import nn

from graphpeft import AdaptError, C3AConfig, get_peft_model
from graphpeft.methods.c3a import circulant, convolved


def test_each_block_is_made_of_one_row():
    model: Any = get_peft_model(LINEAR.build(), C3AConfig(block_size=2, target_modules=["0"]))
    kernel, base = model[0].default.c3a_kernel, LINEAR.build()
    change = (model.merge_and_unload()[0].weight - base[0].weight) * 6  # pyright: ignore[reportIndexIssue]
    for i in range(4):
        for j in range(3):
            a, b = kernel[i, j]
            expected = torch.stack([torch.stack([a, b]), torch.stack([b, a])])
            torch.testing.assert_close(change[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [3, 4])
def test_the_backward_keeps_the_input_and_the_rows_alone(size: int):
    x = torch.randn(2, 5, 3 * size, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = convolved(x, kernel)
    assert [tensor.shape for tensor in kept] == [x.shape, kernel.shape]
    torch.testing.assert_close(made, x @ circulant(kernel).mT)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(convolved, (x, kernel), check_batched_grad=True)
    for gradient in torch.autograd.grad(convolved(x[:0], kernel).sum(), (x, kernel)):
        assert not gradient.any()


def test_an_empty_batch_has_the_type_of_any_other():
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 8)), C3AConfig(block_size=2, target_modules=["0"]))
    x = torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x[:0]).dtype == model(x).dtype
    assert convolved(x[:0].bfloat16(), torch.randn(4, 3, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [4, 3])
def test_a_size_that_does_not_divide_both_sides_is_refused(size: int):
    with pytest.raises(AdaptError, match=rf"block_size={size} doesn't divide both sides .* choose a divisor of 2"):
        get_peft_model(LINEAR.build(), C3AConfig(block_size=size, target_modules=["0"]))


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="init_weights must be"):
        C3AConfig(init_weights="normal")  # pyright: ignore[reportArgumentType]
