"""torch.fx's own tracer follows an adapted model where it follows the base, and the result computes the same."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import graphpeft
from graphpeft import IA3Config, LoraConfig, OFTConfig, PeftWarning, get_peft_model, trace
from graphpeft.graph.errors import GuardError, TraceError
from graphpeft.graph.forward_arguments import leading_to_class

pytestmark = pytest.mark.quick("graph", "model")


class Model(nn.Module):
    """Two layers that are called, one whose weight a function reads, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.skip = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        y = F.linear(self.down(torch.relu(self.up(x))), self.w)
        return y * scale + F.linear(x, self.skip.weight, self.skip.bias)


class Flipping(nn.Module):
    """Decides on an argument that can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, flips: bool = False) -> Tensor:
        y = F.linear(x, self.w)
        return -y if flips else y


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 2, "lora_alpha": 5, "target_modules": list(targets), "init_lora_weights": False} | options
    )


def classifier() -> nn.Module:
    return torchvision.models.resnet18(num_classes=4)


def encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))


X, IMAGE, WORDS = (2, 4), (2, 3, 64, 64), (2, 3, 8)

CASES: dict[str, tuple[Callable[[], nn.Module], Any, tuple[int, ...]]] = {
    "layers": (Model, lora("up", "down"), X),
    "layers and weights": (Model, lora("up", "down", "skip", target_parameters=["w"]), X),
    "DoRA, biases and a copy": (Model, lora("up", use_dora=True, bias="all", modules_to_save=["skip"]), X),
    "OFT": (Model, OFTConfig(target_modules=["up", "skip"], oft_block_size=2), X),
    "(IA)3": (Model, IA3Config(target_modules=["up", "skip"], feedforward_modules=["skip"]), X),
    "convolutions": (classifier, lora("conv1", "conv2", "fc"), IMAGE),
    "attention": (encoder, lora("linear1", "self_attn"), WORDS),
}


def adapted(make: Callable[[], nn.Module], config: Any) -> Any:
    torch.manual_seed(0)
    return shaken(get_peft_model(make().eval(), config))


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def results(model: Any, owner: Any, x: Tensor) -> list[Tensor]:
    """Returns the output and all gradients of a call."""
    owner.zero_grad()
    torch.manual_seed(3)
    y = model(x)
    y.square().sum().backward()
    return [y, *(parameter.grad for parameter in owner.parameters() if parameter.requires_grad)]


def equal(model: Any, traced: Any, x: Tensor) -> None:
    for found, expected in zip(results(traced, model, x), results(model, model, x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_a_retraced_model_has_equal_outputs_and_gradients(name: str) -> None:
    make, config, shape = CASES[name]
    model, x = adapted(make, config), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    fx.symbolic_trace(make())  # the base can be traced
    traced = fx.symbolic_trace(model)
    equal(model, traced, x)
    torch.testing.assert_close(copy.deepcopy(traced)(x), model(x))
    torch.testing.assert_close(fx.symbolic_trace(traced)(x), model(x))


@pytest.mark.parametrize("state", ["two active", "merged", "disabled", "in training"])
def test_it_is_the_model_as_it_is_when_it_is_traced(state: str) -> None:
    model, x = adapted(Model, lora("up", "skip", lora_dropout=0.5)), torch.randn(2, 4)
    if state == "two active":
        model.add_adapter("other", lora("up", "down", r=3, lora_alpha=7))
        model.set_adapter(["default", "other"])
    if state == "merged":
        model.merge_adapter()
    if state == "in training":
        model.train()
    if state == "disabled":
        model.disable_adapter_layers()
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), expected)


def test_a_model_around_an_adapted_one_is_traced() -> None:
    model, x = adapted(Model, lora("up", "skip")), torch.randn(2, 4)
    around = nn.Sequential(nn.Linear(4, 4), model)
    torch.testing.assert_close(fx.symbolic_trace(around)(x), around(x))


def test_a_graph_of_this_library_is_traced_again() -> None:
    x = torch.randn(2, 4)
    flat = adapted(lambda: trace(Model(), (x,)), lora("up", "skip"))
    torch.testing.assert_close(fx.symbolic_trace(flat)(x), flat(x))


def test_a_default_stays_a_default_where_layers_alone_are_adapted() -> None:
    model, x = adapted(Model, lora("up", "down")), torch.randn(2, 4)
    traced = fx.symbolic_trace(model)
    for scale in (2.0, 3.0):
        torch.testing.assert_close(traced(x, scale=scale), model(x, scale=scale))
    torch.testing.assert_close(traced(x), model(x))


def test_a_decision_of_an_adapted_graph_stays_checked() -> None:
    model, x = adapted(Flipping, lora("w")), torch.randn(2, 4)
    for each in (model, fx.symbolic_trace(model)):
        with pytest.raises(GuardError, match="the argument 'flips'"):
            each(x, flips=True)


def test_a_default_stays_a_default_where_a_function_reads_the_weight() -> None:
    model, x = adapted(Model, lora("skip")), torch.randn(2, 4)
    for scale in (2.0, 3.0):
        torch.testing.assert_close(fx.symbolic_trace(model)(x, scale=scale), model(x, scale=scale))


@pytest.mark.filterwarnings("ignore")
def test_quantisation_by_fx_leaves_adapted_layers_in_their_precision() -> None:
    model = adapted(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), lora("0"))
    x, layer = torch.randn(64, 4), model[0]
    expected = model(x)
    with pytest.warns(PeftWarning, match="torch.ao.quantization leaves adapted layers as they are"):
        prepared: Any = prepare_fx(model, get_default_qconfig_mapping(), (x,))
    torch.testing.assert_close(prepared(x), expected)
    converted: Any = convert_fx(prepared)
    assert isinstance(converted.get_submodule("2"), torch.ao.nn.quantized.Linear)
    assert torch.equal(converted.get_submodule("0")(x), layer(x))
    assert (converted(x) - expected).norm() < 0.05 * expected.norm()


class Named(Model):
    def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, scale)


class Others(Model):
    def forward(self, x: Tensor, **others: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x)


class Several(Model):
    def forward(self, *x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x[0])


@pytest.mark.parametrize("cls", [Named, Others, Several])
def test_a_forward_that_it_would_misread_is_refused_with_the_way_out(cls: Any) -> None:
    model, x = adapted(cls, lora("up", "down")), torch.randn(2, 4)
    with pytest.raises(TraceError, match=r"graphpeft\.trace\(model, example_inputs\)"):
        fx.symbolic_trace(model)
    torch.testing.assert_close(graphpeft.trace(model, (x,))(x), model(x))


def test_a_forward_that_is_unwrapped_and_set_on_the_model_leads_to_the_adapters():
    model: Any = get_peft_model(Model(), LoraConfig(r=2, target_parameters=["w"], init_lora_weights=False), "one")
    model.add_adapter("two", LoraConfig(r=3, target_parameters=["w"], init_lora_weights=False))
    model.eval()
    x, rows = torch.randn(2, 4), ["two", "__base__"]
    expected = model(x), model(x, adapter_names=rows)
    model.forward = types.MethodType(inspect.unwrap(type(model).forward), model)  # as accelerate's unwrap_model does
    assert torch.equal(model(x), expected[0])
    assert torch.equal(model(x, adapter_names=rows), expected[1])


def test_what_is_unwrapped_has_the_arguments_of_the_forward():
    class Summing(nn.Module):
        def forward(self, x: Tensor, *rest: Tensor, scale: float = 1.0, **more: Tensor) -> Tensor:
            return (x + sum(rest) + sum(more.values())) * scale

    unwrapped = leading_to_class(Summing.forward)
    assert inspect.signature(unwrapped) == inspect.signature(Summing.forward)
    x = torch.ones(2)
    assert torch.equal(unwrapped(Summing(), x, x, scale=3.0, last=x), torch.full((2,), 9.0))
