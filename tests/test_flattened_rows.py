"""The pass that computes a linear operation and its branches on one matrix of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import block, body_of
from torch import Tensor, nn

from graphpeft import LoraConfig, get_peft_model, optimize

pytestmark = pytest.mark.quick("passes")

PASS = "flattened_rows"


def test_a_layer_and_its_branch_are_computed_on_a_matrix():
    layer: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    report = optimize(layer, [PASS])
    assert report.changed == {PASS: ("0",)}
    of_values = [line for line in body_of(layer[0]) if "self" not in line]
    assert of_values == [
        "input_1 = input",
        "as_rows = as_rows(input_1)",
        "linear = torch._C._nn.linear(as_rows, weight, bias)",
        "linear_1 = torch._C._nn.linear(as_rows, slot0_lora_a)",
        "linear_2 = torch._C._nn.linear(linear_1, slot0_lora_b)",
        "add_scaled = graphpeft_graph_scaled_sum_add_scaled(linear, linear_2, slot0_lora_scaling)",
        "in_shape_of = in_shape_of(add_scaled, input_1)",
        "return in_shape_of",
    ]


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 3, 4, 6), (2, 0, 6)], ids=str)
def test_what_comes_out_has_the_shape_of_what_goes_in(shape):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(shape)
    expected = model(x)
    optimize(model, [PASS])
    assert model(x).shape == (*shape[:-1], 4)
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-6)


def test_operations_that_read_one_value_share_its_matrix():
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.q) * F.linear(x, self.k)

    model: Any = get_peft_model(Fused(), LoraConfig(target_modules=["q", "k"], init_lora_weights=False))
    x = torch.randn(2, 3, 6)
    expected = model(x)
    report = optimize(model, [PASS, "grouped_products"])
    assert report.changed["grouped_products"] == report.changed[PASS] == ("q", "k")
    assert len([line for line in body_of(model) if " = as_rows(" in line]) == 1
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-6)


def test_branches_with_dropout_are_left():
    report = optimize(block("regions", lora_dropout=0.1), [PASS])
    assert set(report.left[PASS].values()) == {"its branch is more than casts, products and sums"}


def test_layers_that_a_flat_graph_calls_are_left():
    assert set(optimize(block("flat"), [PASS]).left[PASS].values()) == {"the graph doesn't compute it by F.linear"}


def test_branches_that_add_a_parameter_are_left():
    # which could be one for each position, and not for each feature
    report = optimize(block("regions", lora_bias=True, target_modules=["q", "v"]), [PASS])
    assert set(report.left[PASS].values()) == {"its branch is more than casts, products and sums"}
