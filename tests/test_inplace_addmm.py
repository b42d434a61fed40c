"""The pass that adds a branch's product to an operation's value in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import block, body_of, inputs
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from graphpeft import LoraConfig, get_peft_model, optimize, trace
from graphpeft.passes.inplace_addmm import add_product_

pytestmark = pytest.mark.quick("passes")


def test_the_product_of_a_branch_is_added_in_place():
    layer: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    optimize(layer, ["inplace_addmm"])
    assert body_of(layer[0])[-3:] == [
        "linear_1 = torch._C._nn.linear(input_1, slot0_lora_a)",
        "add_product_ = add_product_(linear, linear_1, slot0_lora_b, slot0_lora_scaling)",
        "return add_product_",
    ]


def test_products_of_several_adapters_are_added_to_one_value():
    model = block("regions")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q"]))
    model.set_adapter(["default", "second"])
    optimize(model, ["inplace_addmm"])
    assert [line for line in body_of(model.q) if "add_product" in line] == [
        "add_product_ = add_product_(linear, linear_1, slot0_lora_b, slot0_lora_scaling)",
        "add_product__1 = add_product_(add_product_, linear_3, slot1_lora_b, slot1_lora_scaling)",
        "return add_product__1",
    ]


def test_a_value_that_others_read_is_left():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model: Any = get_peft_model(trace(Twice()), LoraConfig(target_modules=["fc"]))
    y = next(node for node in model.graph.nodes if node.op == "call_module")
    output = next(node for node in model.graph.nodes if node.op == "output")
    output.args = ((y, output.args[0]),)
    model.recompile()
    report = optimize(model, ["inplace_addmm"])
    assert report.left["inplace_addmm"] == {"fc": "others read the operation's value, too"}


def test_a_hook_that_keeps_a_layers_output_keeps_what_the_layer_gave():
    kept = []
    model = block("flat")
    optimize(model, ["inplace_addmm"])
    model.q.register_forward_hook(lambda module, args, output: kept.append(output))
    x = inputs()
    model(x)
    assert torch.equal(kept[0], F.linear(torch.tanh(x), model.q.weight, model.q.bias))


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_hook_on_gradients_gets_those_of_the_layers_output(kind):
    seen = []
    model = block("flat")
    optimize(model, ["inplace_addmm"])
    getattr(model.q, kind)(lambda module, *gradients: seen.append(gradients[-1][0]))
    y = model(inputs())
    y.sum().backward()
    [gradient] = seen
    assert gradient.shape == (2, 3, 4)


def test_a_hook_of_all_modules_keeps_what_the_layers_gave():
    kept = {}
    model = block("flat")
    optimize(model, ["inplace_addmm"])
    with register_module_forward_hook(lambda module, args, output: kept.update({module: output})):
        x = inputs()
        model(x)
    assert torch.equal(kept[model.q], F.linear(torch.tanh(x), model.q.weight, model.q.bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_where_the_plain_form_rounds(dtype):
    y, d, B = (torch.randn(shape).to(dtype) for shape in ((7, 5), (7, 2), (5, 2)))
    expected = torch.add(y, F.linear(d, B), alpha=0.3)
    assert torch.equal(add_product_(y.clone(), d, B, 0.3), expected)


def test_no_other_sum_is_in_memory_at_its_end():
    weight, A, B = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    for shape in [(6,), (3, 6), (2, 3, 6), (2, 2, 3, 6)]:
        x = torch.randn(shape)
        y = F.linear(x, weight)
        expected = torch.add(y, F.linear(F.linear(x, A), B), alpha=0.5)
        total = add_product_(y, F.linear(x, A), B, 0.5)
        assert total.data_ptr() == y.data_ptr()
        assert torch.allclose(total, expected, rtol=0, atol=1e-6)
