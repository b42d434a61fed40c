"""The graphs of PyTorch's layers are given: they compute what the layers' own forwards do, whatever is set later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graphpeft import AdaptError, GuardError, LoraConfig, get_peft_model
from graphpeft.graph import layers
from graphpeft.graph.layers import given
from graphpeft.graph.template import template_of
from graphpeft.testing import laws

pytestmark = pytest.mark.quick("graph")


class Kind(NamedTuple):
    """A kind of layer.

    Attributes:
        make: Builds the layer.
        x: Its input.
        later: An option that its user may set after it was adapted.
    """

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    later: Mapping[str, Any] = MappingProxyType({})


def image(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 4, *size)


def tokens() -> Tensor:
    return torch.tensor([[0, 3, 8], [1, 1, 2]])


KINDS = {
    "linear": Kind(lambda: nn.Linear(4, 6), image(4)),
    "linear without bias": Kind(lambda: nn.Linear(4, 6, bias=False), image(4)),
    "attention's": Kind(lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(4, 6), image(4)),
    "Conv1D": Kind(lambda: Conv1D(6, 4), image(4)),
    "1d": Kind(lambda: nn.Conv1d(4, 6, 3, stride=2), image(9), {"stride": (1,)}),
    "2d": Kind(lambda: nn.Conv2d(4, 6, 3, padding="same"), image(9, 8), {"padding": (2, 0)}),
    "2d in groups": Kind(lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), image(9, 8), {"dilation": (2, 1)}),
    "2d that reflects": Kind(lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), image(9, 8)),
    "3d": Kind(lambda: nn.Conv3d(4, 6, 2, dilation=2), image(5, 4, 4), {"stride": (2, 1, 2)}),
    "transposed 1d": Kind(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), image(5)),
    "transposed 2d": Kind(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), image(5, 4), {"stride": (2, 2)}),
    "transposed 3d": Kind(lambda: nn.ConvTranspose3d(4, 6, 2), image(3, 3, 2), {"padding": (1, 0, 1)}),
    "embedding": Kind(lambda: nn.Embedding(9, 4, padding_idx=1), tokens, {"padding_idx": 3}),
    "embedding that shortens": Kind(lambda: nn.Embedding(9, 4, max_norm=0.5), tokens, {"max_norm": 0.25}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def built(kind: str) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(KINDS[kind].make())


def adapted(kind: str) -> Any:
    return get_peft_model(built(kind), LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))


def inputs(kind: str) -> Tensor:
    torch.manual_seed(1)
    return KINDS[kind].x()


@each_kind
def test_a_fresh_adapter_on_the_given_graph_changes_no_bit(kind):
    model, base = adapted(kind), built(kind)
    assert given(base[0]) is not None
    assert torch.equal(model(inputs(kind)), base(inputs(kind)))


@each_kind
def test_its_gradients_are_those_of_the_layer(kind):
    model, base = adapted(kind), built(kind)
    for layer in (model[0], base[0]):
        layer.weight.requires_grad_()
    for each in (model, base):
        each(inputs(kind)).square().sum().backward()
    assert torch.equal(model[0].weight.grad, base[0].weight.grad)


@each_kind
def test_an_option_that_is_set_later_is_followed(kind):
    model, base = adapted(kind), built(kind)
    for layer in (model[0], base[0]):
        for name, value in KINDS[kind].later.items():
            setattr(layer, name, value)
    assert torch.equal(model(inputs(kind)), base(inputs(kind)))


@each_kind
def test_only_an_output_size_is_checked_in_its_calls(kind):
    checks = [line for line in adapted(kind)[0].code.splitlines() if "expect" in line]
    assert ["output_size" in line for line in checks] == [True] * ("transposed" in kind)


def test_layers_of_a_class_share_one_graph_whatever_their_options_are():
    layers = (nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(1, 2, (1, 5), dilation=3, padding="same"))
    assert given(layers[0]) is given(layers[1]) is not None


# options on which their code decides


DECIDED = {
    "2d": ("padding_mode", "circular"),
    "2d that reflects": ("padding_mode", "zeros"),
    "embedding": ("max_norm", 1.0),
}


@pytest.mark.parametrize("kind", DECIDED)
def test_an_option_on_which_its_code_decides_stays_while_an_adapter_acts(kind):
    name, value = DECIDED[kind]
    model = adapted(kind)
    expected, before = model(inputs(kind)), laws.snapshot(model)
    with pytest.raises(GuardError, match=f"{name} of a .* was .* when it was adapted, and is to be {value!r} now"):
        setattr(model[0], name, value)
    laws.require_unchanged(model, before, "a refused option")
    setattr(model[0], name, getattr(model[0], name))
    assert torch.equal(model(inputs(kind)), expected)


@pytest.mark.parametrize("kind", DECIDED)
def test_where_it_was_set_while_none_acted_none_acts_again(kind):
    name, value = DECIDED[kind]
    model = adapted(kind)
    was = getattr(model[0], name)
    model.set_adapter([])
    setattr(model[0], name, value)
    before = laws.snapshot(model)
    with pytest.raises(GuardError, match=f"{name} of a .* is to be {value!r} now"):
        model.set_adapter("default")
    laws.require_unchanged(model, before, "a refused activation")
    setattr(model[0], name, was)
    model.set_adapter("default")
    assert torch.equal(model(inputs(kind)), built(kind)(inputs(kind)))


def test_it_isnt_merged_where_another_one_was_set_either():
    model = adapted("embedding")
    model.set_adapter([])
    model[0].max_norm = 0.1
    before = laws.snapshot(model)
    with pytest.raises(GuardError, match="max_norm of a Embedding was None when it was adapted"):
        model.merge_adapter(["default"])
    laws.require_unchanged(model, before, "a refused merge")


def test_an_unloaded_layer_has_its_options_back():
    model = adapted("2d").unload()
    model[0].padding_mode = "circular"
    assert type(model[0]) is nn.Conv2d
    assert vars(model[0])["padding_mode"] == "circular"


# what looks like a layer


class Doubled(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(input, weight, bias)


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


def set_on_the_instance() -> nn.Module:
    layer = nn.Conv2d(4, 6, 3)
    own = layer._conv_forward
    vars(layer)["_conv_forward"] = lambda *args: 2 * own(*args)
    return layer


OTHERS = {
    "a convolution with a method of its own": lambda: Doubled(4, 6, 3),
    "one that was set on the instance": set_on_the_instance,
    "a linear layer with a forward of its own": lambda: Halved(4, 6),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_computes_otherwise_is_no_such_layer(other):
    torch.manual_seed(0)
    layer = OTHERS[other]()
    assert given(layer) is None
    model, x = nn.Sequential(layer), torch.randn(2, 4, 4, 4) if isinstance(layer, nn.Conv2d) else torch.randn(2, 4)
    expected = model(x)
    try:
        get_peft_model(model, LoraConfig(r=2, target_parameters=["0.weight"]))
    except AdaptError:
        assert template_of(layer) is None
    assert torch.equal(model(x), expected)


def test_a_forward_that_somebody_has_put_on_pytorchs_class_has_no_given_graph(monkeypatch):
    own = nn.Linear.forward

    def doubled(self: nn.Linear, input: Tensor) -> Tensor:
        return 2 * own(self, input)

    # as where it was put there before the library was imported
    monkeypatch.setitem(layers._GRAPHS, doubled, layers._GRAPHS[own])
    monkeypatch.setattr(nn.Linear, "forward", doubled)
    model = adapted("linear")
    x = inputs("linear")
    assert given(nn.Linear(4, 6)) is None
    assert torch.equal(model(x), built("linear")(x))


def test_nor_has_a_convolution_by_a_method_that_somebody_has_put_there(monkeypatch):
    own = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *args: 2 * own(*args))
    assert given(nn.Conv2d(4, 6, 3)) is None
    assert torch.equal(adapted("2d")(inputs("2d")), built("2d")(inputs("2d")))


class WithOptionsOfTheClass(nn.Embedding):
    max_norm = None

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.randn(9, 4))
        self.padding_idx, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False


def test_an_option_that_is_the_classs_gives_no_graph_and_an_adapted_model_all_the_same():
    model, x = nn.Sequential(WithOptionsOfTheClass()), tokens()
    assert given(model[0]) is None
    expected = model(x)
    assert torch.equal(get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))(x), expected)


LACKING = {
    "linear": lambda: nn.Linear(4, 6, bias=False),
    "2d": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "transposed 1d": lambda: nn.ConvTranspose1d(4, 6, 3, bias=False),
}


@pytest.mark.parametrize("make", LACKING.values(), ids=LACKING)
def test_a_bias_that_comes_later_is_refused_since_the_graph_has_none(make: Callable[[], nn.Module]) -> None:
    model = get_peft_model(nn.Sequential(make()), LoraConfig(r=2, target_modules=["0"]))
    bias = nn.Parameter(torch.ones(6))
    with pytest.raises(GuardError, match="was None when it was adapted, and is to be a parameter now"):
        model[0].bias = bias
    assert model[0].bias is None
    model[0].bias = None
    model.disable_adapter_layers()
    model[0].bias = bias
    with pytest.raises(GuardError, match="was None when it was adapted, and is to be a parameter now"):
        model.enable_adapter_layers()
    model.unload()
    assert model[0].bias is bias


def test_a_bias_that_was_taken_away_is_none_of_a_merged_layer() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    model[0].bias = None
    x = torch.randn(2, 4)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
