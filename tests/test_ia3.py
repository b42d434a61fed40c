"""(IA)³ on whole models, on layers that PEFT doesn't adapt, and combined."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import GPT2, LLAMA, Example
from oracle import LINEAR, Case, moved
from quantised import by_bitsandbytes, by_torchao
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig

import graphpeft
from graphpeft import AdaptError, IA3Config, get_peft_model
from graphpeft.methods.ia3 import InputFactors

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through")


def test_a_pattern_names_feed_forward_modules_by_their_whole_path():
    options: dict[str, Any] = {"target_modules": r".*(q_proj|down_proj)", "feedforward_modules": r".*\.1\..*down_proj"}
    shapes = []
    for library in (peft, graphpeft):
        state = library.get_peft_model_state_dict(library.get_peft_model(LLAMA.build(), library.IA3Config(**options)))
        shapes.append({key: tensor.shape for key, tensor in state.items()})
    assert shapes[0] == shapes[1]
    assert {shape[0] == 1 for key, shape in shapes[1].items() if "down_proj" in key} == {True, False}


def test_inputs_of_groups_are_scaled_as_in_peft_active_and_merged():
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2)), torch.randn(2, 6, 5, 5)
    options: dict[str, Any] = {"target_modules": ["0"], "feedforward_modules": ["0"]}
    theirs: Any = moved(peft.get_peft_model(copy.deepcopy(base), peft.IA3Config(**options)))
    ours: Any = get_peft_model(copy.deepcopy(base), IA3Config(**options))
    graphpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.merge_and_unload()(x), theirs(x))


QUANTISED: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes": by_bitsandbytes(__import__("bitsandbytes").nn.LinearNF4),
    "torchao": by_torchao(Int8WeightOnlyConfig),
}


@pytest.mark.parametrize("enters", [[], ["0", "2"]], ids=["outputs", "inputs"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_layers_are_scaled_and_not_merged(kind: str, enters: list[str]):
    case = Case(kind, QUANTISED[kind], lambda: (torch.randn(3, 64),))
    (x,) = case.inputs()
    model: Any = moved(
        get_peft_model(case.build(), IA3Config(target_modules=["0", "2"], feedforward_modules=enters)), seed=4
    )
    base, first, second = case.build(), *(model[index].default.ia3_l.flatten() for index in (0, 2))
    hidden = base[0](x * first) if enters else base[0](x) * first  # pyright: ignore[reportIndexIssue]
    hidden = base[1](hidden)  # pyright: ignore[reportIndexIssue]
    expected = base[2](hidden * second) if enters else base[2](hidden) * second  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(AdaptError, match="the factors of a quantised layer aren't merged"):
        model.merge_adapter()


@pytest.mark.parametrize("enters", [[], ["0"]], ids=["outputs", "inputs"])
def test_a_combination_has_the_weighted_sum_of_factors_as_in_peft(enters: list[str]):
    states = []
    for library in (peft, graphpeft):
        config = library.IA3Config(target_modules=["0"], feedforward_modules=enters, init_ia3_weights=False)
        torch.manual_seed(1)
        model: Any = library.get_peft_model(LINEAR.build(), config)
        model.add_adapter("second", config)
        model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum")
        states.append(library.get_peft_model_state_dict(model, adapter_name="sum"))
        if library is graphpeft:
            with pytest.raises(AdaptError, match="combination_type='cat' isn't for IA3"):
                model.add_weighted_adapter(["default", "second"], [1, 1], "other", "cat")
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_modules": ["0"], "feedforward_modules": ["1"]}, r"feedforward_modules names \['1'\], which target"),
        ({"target_modules": ["0"]}, "feedforward_modules is None, and no default is known for the model"),
    ],
)
def test_what_names_no_feed_forward_modules_is_refused(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        get_peft_model(LINEAR.build(), IA3Config(**options))


@pytest.mark.parametrize(
    ("example", "targets", "named"),
    [
        (LLAMA, ["q_proj", "v_proj"], set()),
        (LLAMA, ["q_proj", "down_proj"], {"down_proj"}),
        (GPT2, ["c_attn"], set()),
        (GPT2, ["c_proj"], {"mlp.c_proj"}),
        (LLAMA, "all-linear", {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_the_feed_forward_modules_of_a_known_model_are_those_among_the_targets(
    example: Example, targets: Any, named: set[str], tmp_path: Path
):
    config = IA3Config(target_modules=targets)
    model = get_peft_model(example.build(), config)
    assert config == IA3Config(target_modules=targets)
    assert model.peft_config["default"].feedforward_modules == named
    model.save_pretrained(tmp_path)
    expected = peft.get_peft_model(example.build(), peft.IA3Config(target_modules=targets))
    kinds = {name: module.is_feedforward for name, module in expected.named_modules() if hasattr(module, "ia3_l")}
    for other in (graphpeft.PeftModel.from_pretrained(example.build(), tmp_path), model):
        rules = {adapted.site.name: adapted.rule for adapted in other._peft_adapters.by_name["default"].sites}
        found = {f"base_model.model.{name}": isinstance(rule, InputFactors) for name, rule in rules.items()}
        assert found == kinds
    peft.PeftModel.from_pretrained(example.build(), tmp_path)


def test_a_stack_of_stacks_is_refused_by_its_shape():
    class Stacks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(1, 2, 6, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.up

    model = Stacks()
    with pytest.raises(AdaptError, match=r"up of shape \(1, 2, 6, 5\) is no matrix, whose features have factors"):
        get_peft_model(model, IA3Config(target_modules=["up"], feedforward_modules=[]))


class ReadsAKernel(nn.Module):
    """Convolves with a kernel of a layer that it doesn't call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv1d(x, self.layer.weight * 2, self.layer.bias)


@pytest.mark.parametrize("inputs", [True, False], ids=["inputs", "outputs"])
def test_a_kernel_that_is_read_otherwise_is_scaled(inputs: bool):
    torch.manual_seed(0)
    base, x = ReadsAKernel(), torch.randn(2, 4, 9)
    options: Any = {"target_modules": ["layer"], "feedforward_modules": ["layer"] if inputs else []}
    model: Any = moved(get_peft_model(copy.deepcopy(base), IA3Config(**options)))
    factors = model.layer.default.ia3_l
    with torch.no_grad():
        base.layer.weight.mul_(factors if inputs else factors.transpose(0, 1))
        if not inputs:
            nn.Module.get_parameter(base.layer, "bias").mul_(factors.flatten())
    torch.testing.assert_close(model(x), base(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(x), base(x), atol=1e-5, rtol=1e-4)
