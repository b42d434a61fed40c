"""What LoRA writes into a graph, and that taking it out leaves the graph as it was."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from graphpeft import LoraConfig, get_peft_model, trace
from graphpeft.graph.tags import TAG
from graphpeft.graph.template import template_of
from graphpeft.sites import dataflow

pytestmark = pytest.mark.quick("sites", "methods")


def body_of(module: Any) -> list[str]:
    """Returns the statements of a graph module's forward, without what frees values."""
    lines = [line.split(";")[0].strip() for line in module.code.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "def"))]


BEFORE = [
    "input_1 = input",
    "weight = self.weight",
    "bias = self.bias",
    "linear = torch._C._nn.linear(input_1, weight, bias)",
]


def test_a_linear_layer_gets_a_branch():
    layer = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))[0]
    assert body_of(layer) == [
        BEFORE[0],
        'weight = _graphpeft_own_tensor(self, "weight")',
        *BEFORE[2:],
        "slot0_lora_a = self.slot0.lora_A",
        "slot0_lora_b = self.slot0.lora_B",
        "slot0_lora_scaling = self.slot0.lora_scaling",
        "linear_1 = torch._C._nn.linear(input_1, slot0_lora_a)",
        "linear_2 = torch._C._nn.linear(linear_1, slot0_lora_b)",
        "add_scaled = graphpeft_graph_scaled_sum_add_scaled(linear, linear_2, slot0_lora_scaling)",
        "return add_scaled",
    ]


def test_dropout_reads_whether_the_layer_is_in_training():
    layer = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], lora_dropout=0.5))[0]
    assert (
        "dropout = torch.nn.functional.dropout(input_1, p = slot0_lora_dropout_p, "
        "training = slot0_lora_dropout_training, inplace = False)" in body_of(layer)
    )
    assert "slot0_lora_dropout_training = self.slot0.lora_dropout.training" in body_of(layer)


def test_half_precision_layers_get_a_branch_in_single_precision():
    layer = get_peft_model(nn.Sequential(nn.Linear(4, 4)).bfloat16(), LoraConfig(target_modules=["0"]))[0]
    code = body_of(layer)
    assert [line for line in code if ".to(" in line or "dtype" in line] == [
        "getattr_1 = slot0_lora_a.dtype",
        "to = input_1.to(getattr_1)",
        "getattr_2 = linear.dtype",
        "to_1 = add_scaled.to(getattr_2)",
    ]


def test_equal_layers_share_one_class_until_somebody_asks_for_a_graph():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8)), LoraConfig(target_modules=["0", "1"]))
    assert type(model[0]) is type(model[1])
    assert model[0].graph is not None
    assert type(model[0]) is not type(model[1])


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def test_equal_modules_are_recorded_once():
    model = get_peft_model(nn.Sequential(Product(), Product()), LoraConfig(r=2, target_modules=["w"]))
    assert template_of(model[0]) is template_of(model[1]) is not None


def test_an_edit_of_one_layers_graph_is_its_own():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0", "1"]))
    x = torch.randn(2, 4)
    expected = model[1](x)
    output = next(node for node in model[0].graph.nodes if node.op == "output")
    with model[0].graph.inserting_before(output):
        output.args = (model[0].graph.call_function(torch.neg, output.args),)
    before = model[0](x)
    model[0].recompile()
    assert torch.equal(model[0](x), -before)
    assert torch.equal(model[1](x), expected)


def test_every_node_of_an_adapter_tells_whose_it_is():
    traced: Any = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    before = len(traced.graph.nodes)
    get_peft_model(traced, LoraConfig(target_modules=["0"]), "mine")
    tags = [node.meta[TAG] for node in traced.graph.nodes if TAG in node.meta]
    assert len(traced.graph.nodes) == before + len(tags)
    assert {(tag.slot, tag.method, tag.site) for tag in tags} == {(0, "LORA", "_0")}


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_adapters_come_and_go_in_every_order(order):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    base = model(x)
    model = trace(model)
    code = model.code
    for name in "abc":
        get_peft_model(model, LoraConfig(target_modules=["0", "1"], init_lora_weights=False, r=2), name)
    alone = {}
    for name in order:
        model.set_adapter(name)
        alone[name] = model(x)
    model.set_adapter([])
    for count in (1, 2, 3, 2, 1, 0):
        model.set_adapter(list(order[:count]))
        if count == 1:
            assert torch.equal(model(x), alone[order[0]])
    assert torch.equal(model(x), base)
    assert model.code == code
    assert model.unload().code == code


def test_dataflow_tells_what_reaches_the_output():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            self.unused(x)
            return self.q(x) * self.k(x)

    graph = trace(Attention()).graph
    calls = [node for node in graph.nodes if node.op == "call_module"]
    alive = dataflow.reaching_output(graph)
    assert [node.target for node in calls if node in alive] == ["q", "k"]
    assert dataflow.as_digraph(graph).number_of_nodes() == len(graph.nodes)
