"""A program that `torch.export` makes of an adapted model names the layers in it, as quantisers and others ask."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import graphpeft
from graphpeft import LoraConfig, get_peft_model

pytestmark = pytest.mark.quick("graph")

LINEAR, CONV = "torch.nn.modules.linear.Linear", "torch.nn.modules.conv.Conv2d"


class Block(nn.Module):
    """Uses a weight by a function, and a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.layer = nn.Parameter(torch.ones(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x @ self.mix))


def layers_of(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Returns the path and the class of the innermost layer of each product in the program of a model."""
    program = torch.export.export(model.eval(), (x,), strict=False)
    products = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default, torch.ops.aten.matmul.default)
    return [list(n.meta["nn_module_stack"].values())[-1] for n in program.graph.nodes if n.target in products]


def test_each_product_of_an_adapted_layer_is_a_layer() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.Linear(4, 8)), LoraConfig(r=2, target_modules=["0", "1"])
    )
    assert layers_of(model, torch.ones(1, 2, 3, 4)) == [
        ("0", CONV),
        ("0.default.lora_A", CONV),
        ("0.default.lora_B", CONV),
        ("1", LINEAR),
        ("1.default.lora_A", LINEAR),
        ("1.default.lora_B", LINEAR),
    ]


def test_the_layers_inside_of_a_module_with_a_graph_have_their_own_paths() -> None:
    model = get_peft_model(nn.Sequential(Block()), LoraConfig(r=2, target_modules=["layer", "mix"]))
    block, of_layer = (
        f"{__name__}.Block",
        [(f"0.layer{end}", LINEAR) for end in ("", ".default.lora_A", ".default.lora_B")],
    )
    assert layers_of(model, torch.ones(1, 8)) == [*[("0", block)] * 3, *of_layer, *of_layer]


def test_a_layer_with_a_computed_weight_and_a_model_inside_of_another_one_are_exported() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    inner = get_peft_model(nn.Sequential(normed, nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0", "1"]))
    outer = get_peft_model(nn.Sequential(inner, nn.Linear(4, 4)), LoraConfig(r=2, target_modules=r"1"), "outer")
    layers = [path for path, _ in layers_of(outer, torch.ones(1, 4))]
    assert layers[-3:] == ["1", "1.outer.lora_A", "1.outer.lora_B"]
    assert layers[-6:-3] == ["0.1", "0.1.default.lora_A", "0.1.default.lora_B"]
    assert {"0.0.default.lora_A", "0.0.default.lora_B"} <= {*layers}


def test_a_quantiser_finds_as_many_layers_as_beside_peft() -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizers = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")

    def quantised(library: Any) -> int:
        base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        model = library.get_peft_model(
            base, library.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        )
        program = torch.export.export(model.eval(), (torch.ones(2, 8),)).module()
        config = quantizers.get_default_x86_inductor_quantization_config()
        prepared = pt2e.prepare_pt2e(program, quantizers.X86InductorQuantizer().set_global(config))
        prepared(torch.ones(2, 8))
        nodes = pt2e.convert_pt2e(prepared).graph.nodes
        return sum("quantize" in str(node.target) for node in nodes)

    assert quantised(graphpeft) == quantised(peft) > 0
