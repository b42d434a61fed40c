"""Skew-symmetric matrices from their upper triangles: what is saved for the backward, and gradients of any order."""

from __future__ import annotations

import pytest
import torch

from graphpeft.methods.skew import skew


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_the_backward_keeps_nothing_and_has_gradients_of_any_order(shape: tuple[int, ...]):
    triangles = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = skew(triangles, 4)
    assert kept == []
    torch.testing.assert_close(made, -made.mT)
    torch.testing.assert_close(made[..., 0, 1:], triangles[..., :3])
    torch.testing.assert_close(made[..., 2, 3], triangles[..., 5])
    assert torch.autograd.gradcheck(lambda given: skew(given, 4), triangles, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda given: skew(given, 4).square(), triangles)


def test_functional_transforms_give_the_same():
    triangles = torch.randn(3, 6)
    torch.testing.assert_close(torch.func.vmap(lambda each: skew(each, 4))(triangles), skew(triangles, 4))
    gradient = torch.func.grad(lambda given: skew(given, 4)[0].square().sum())(triangles)
    torch.testing.assert_close(gradient[0], 4 * triangles[0])
