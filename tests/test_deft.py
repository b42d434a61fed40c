"""DEFT: what is taken out is the base's, whatever acts beside it; what can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import LINEAR, moved

import graphpeft
from graphpeft import AdaptError, DeftConfig, ExportError, IA3Config, LoraConfig, get_peft_model


def adapted(first: Any, second: Any) -> Any:
    model: Any = get_peft_model(LINEAR.build(), first)
    model.add_adapter("second", second)
    model.set_adapter(["default", "second"])
    return moved(model)


BESIDE = {
    "lora": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    "of outputs": IA3Config(target_modules=["0"], feedforward_modules=[]),
    "of inputs": IA3Config(target_modules=["0"], feedforward_modules=["0"]),
    "with a bias": LoraConfig(r=2, target_modules=["0"], bias="lora_only"),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_the_output_of_the_base_is_known_beside_what_changes_it(beside: str):
    model = adapted(BESIDE[beside], DeftConfig(r=2, target_modules=["0"]))
    active = model(*LINEAR.inputs())
    model.merge_adapter()
    torch.testing.assert_close(model(*LINEAR.inputs()), active)


def test_a_layer_with_few_outputs_has_as_many_directions():
    model: Any = get_peft_model(LINEAR.build(), DeftConfig(r=20, alpha=4, target_modules=["0"]))
    assert model[0].default.deft_P.shape == (8, 8)
    assert model[0].default.scale == 0.5


def test_orthogonal_directions_are_exported_where_the_format_has_them(tmp_path: Path):
    model: Any = get_peft_model(LINEAR.build(), DeftConfig(r=2, decomposition_method="qr", target_modules=["0"]))
    graphpeft.export(model, LINEAR.inputs(), tmp_path / "model.pt2", "pt2", adapters="baked")
    graphpeft.export(model, LINEAR.inputs(), tmp_path / "model.onnx", "onnx", adapters="merged")
    with pytest.raises(ExportError, match=r"ONNX has no operator for aten\.linalg_qr"):
        graphpeft.export(model, LINEAR.inputs(), tmp_path / "baked.onnx", "onnx", adapters="baked")


def test_dropout_of_r_is_refused_where_it_has_no_input_of_its_own():
    base = torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3))
    with pytest.raises(AdaptError, match="deft_dropout is for the input of R alone"):
        get_peft_model(base, DeftConfig(r=2, deft_dropout=0.1, target_modules=["0"]))


def test_an_unknown_way_to_find_directions_is_refused():
    with pytest.raises(ValueError, match="decomposition_method must be"):
        DeftConfig(decomposition_method="svd")  # pyright: ignore[reportArgumentType]
