"""BEFT behind another method, on quantised layers, and where no bias can be added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import LinearNF4
from oracle import LINEAR, Case, assert_close, moved, outputs
from quantised import by_bitsandbytes
from torch import nn

from graphpeft import AdaptError, BeftConfig, IA3Config, get_peft_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:no gradient goes through", "ignore:Detected that the base layer has no bias term"
)


def test_a_bias_is_scaled_by_a_method_that_acts_later_active_and_merged():
    model: Any = get_peft_model(LINEAR.build(), BeftConfig(target_modules=["0"]))
    model.add_adapter("scaled", IA3Config(target_modules=["0"], feedforward_modules=[]))
    model.set_adapter(["default", "scaled"])
    moved(model)
    base, adapter = LINEAR.build(), model[0]
    (x,) = LINEAR.inputs()
    expected = base[1]((base[0](x) + adapter.default.beft_bias) * adapter.scaled.ia3_l.flatten())  # type: ignore[index]
    assert_close(model(x), expected)
    model.merge_adapter()
    assert_close(model(x), expected)


def test_quantised_layers_have_biases_that_are_not_merged():
    case = Case("nf4", by_bitsandbytes(LinearNF4), lambda: (torch.randn(3, 64),))
    model: Any = moved(get_peft_model(case.build(), BeftConfig(target_modules=["2"])))
    assert_close(outputs(model, case), outputs(case.build(), case) + model[2].default.beft_bias, 1e-5)
    with pytest.raises(AdaptError, match="only codes of quantised layers are merged, and no bias"):
        model.merge_adapter()


def test_a_weight_of_no_one_operation_is_refused():
    base = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(AdaptError, match="a bias is added to what an operation gives, and no one operation uses its"):
        get_peft_model(base, BeftConfig(target_modules=["0"]))
