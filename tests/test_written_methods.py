"""Methods as an author writes them, alone and on top of each other."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import written_methods
from oracle import CONV_1D, CONV_2D, CONV_3D, LINEAR, POINTWISE, Case, moved
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from written_methods import PlacesConfig, SharingConfig

import graphpeft
from graphpeft import (
    AdaptError,
    BoundaryRule,
    DeltaRule,
    IA3Config,
    InputRule,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    OperationRule,
    ParameterSpec,
    PeftModel,
    RunsByRow,
    TargetedConfig,
    WeightRule,
    get_peft_model,
    recorded,
    trace,
)
from graphpeft.graph.template import template_of
from graphpeft.methods.loha import LoHa
from graphpeft.rules import registry
from graphpeft.testing import assert_two_adapters_act_together


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    """Registers the methods for these tests alone."""
    before = registry.registered()
    for method in written_methods.METHODS:
        graphpeft.register(method)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


# what an operation is given


class Shared(nn.Module):
    """Three projections of one input, one of which is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x) + self.v(x) + self.v(x.tanh()) + x


def test_an_input_is_changed_for_the_named_operations_alone() -> None:
    torch.manual_seed(0)
    base, x = Shared().eval(), torch.randn(3, 6)
    flat = trace(copy.deepcopy(base), (x,))
    config = IA3Config(target_modules=["q", "v"], feedforward_modules=["q", "v"])
    expected, q, v = copy.deepcopy(base), torch.rand(6), torch.rand(6)
    for model in (base, flat):
        adapted: Any = get_peft_model(model, config)
        with torch.no_grad():
            adapted.get_submodule("q").default.ia3_l.copy_(q[None])
            adapted.get_submodule("v").default.ia3_l.copy_(v[None])
        got = adapted(x)
        want = expected.q(x * q) * expected.k(x) + expected.v(x * v) + expected.v(x.tanh() * v) + x
        torch.testing.assert_close(got, want)


def test_an_operation_whose_input_changes_is_computed_once() -> None:
    model = get_peft_model(LINEAR.build(), IA3Config(target_modules=["0"], feedforward_modules=["0"]))
    template = template_of(model.get_submodule("0"))
    assert template is not None
    (graph,) = template.graphs
    assert [node.name for node in graph.nodes] == [
        *("input_1", "weight", "bias", "slot0_ia3_l", "flatten", "mul", "getattr_1", "to", "linear", "output")
    ]


# constants


@dataclass(frozen=True)
class OwnTensor(DeltaRule):
    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"w": ParameterSpec(site.matrix_shape, key="w")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["w"].zero_()

    def delta(self, w: Any) -> Any:
        return w @ torch.eye(6)


@dataclass(kw_only=True)
class OwnTensorConfig(TargetedConfig):
    peft_type = "OWN_TENSOR"

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return OwnTensor()


@pytest.fixture(autouse=True)
def own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each test a class of its own, since equal rules share graphs, and tests set functions on the class."""
    own: Any = type("OwnTensor", (OwnTensor,), {})
    monkeypatch.setattr(OwnTensorConfig, "rule_for", lambda self, site, dtype: own())


def test_a_tensor_of_the_rules_own_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(AdaptError, match=r"OwnTensor of .*computes with a tensor of shape \(6, 6\) of its own"):
        get_peft_model(model, OwnTensorConfig(target_modules=["0"]))
    assert type(model[0]) is nn.Linear
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_a_rule_that_switches_gradients_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def delta(self: Any, w: Any) -> Any:
        with torch.no_grad():
            norm = w.norm()
        return w / (1 + norm)

    monkeypatch.setattr(OwnTensor, "delta", delta)
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(AdaptError, match=r"OwnTensor of .*computes under torch.no_grad\(\).*call detach\(\)"):
        get_peft_model(model, OwnTensorConfig(target_modules=["0"]))
    assert type(model[0]) is nn.Linear

    monkeypatch.setattr(OwnTensor, "delta", lambda self, w: w / (1 + w.detach().norm()))
    with torch.no_grad():  # the mode in which a model is adapted is no matter of the rule
        adapted: Any = get_peft_model(model, OwnTensorConfig(target_modules=["0"]))
    with torch.no_grad():
        adapted[0].default.w.fill_(0.5)
    x = torch.randn(2, 6)
    adapted(x).sum().backward()
    expected = x.sum(0).expand(6, 6) / (1 + 0.5 * 6)
    torch.testing.assert_close(adapted[0].default.w.grad, expected)


@pytest.mark.parametrize("case", [CONV_1D, CONV_2D, CONV_3D, POINTWISE], ids=str)
def test_a_delta_is_that_of_a_stored_weight_for_transposed_convolutions_too(case: Case) -> None:
    plain: Any = case.build().get_submodule("0")
    positions = plain.weight.ndim - 2
    cls: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[positions - 1]
    for groups in (1, 2):
        torch.manual_seed(0)
        base = nn.Sequential(cls(4, 6, 3, stride=2, groups=groups))
        x = torch.randn(2, 4, *(5,) * positions)
        model = moved(get_peft_model(base, LoHaConfig(r=2, alpha=3, target_modules=["0"])))
        active = model(x)
        assert model.get_submodule("0").default.hada_w1_a.shape == (6, 2)
        torch.testing.assert_close(model.merge_and_unload()(x), active, atol=1e-5, rtol=1e-5)


# parameters that are more than a site's own


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).eval()


VERA = {"r": 3, "target_modules": ["0", "2"], "d_initial": 0.5}
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("saves", [True, False])
def test_one_tensor_serves_all_sites_and_is_written_once_or_not_at_all(saves: bool, tmp_path: Path) -> None:
    model: Any = moved(get_peft_model(two_layers(), SharingConfig(**VERA, save_projection=saves)))
    first, second = model.get_submodule("0"), model.get_submodule("2")
    assert first.default.A is second.default.A
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 2 * (6 + 3)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key for key in keys if "lambda" not in key} == (
        {"base_model.vera_A", "base_model.vera_B"} if saves else set()
    )
    loaded: Any = PeftModel.from_pretrained(two_layers(), tmp_path)
    assert torch.equal(loaded(X), model(X))
    assert loaded.get_submodule("0").default.A is loaded.get_submodule("2").default.A


@pytest.mark.parametrize("saves", [True, False])
def test_another_adapter_takes_the_place_of_one_with_shared_tensors(saves: bool, tmp_path: Path) -> None:
    models = [
        moved(get_peft_model(two_layers(), SharingConfig(**VERA, save_projection=saves, projection_prng_key=key)), key)
        for key in (1, 2)
    ]
    expected = models[1](X)
    models[1].save_pretrained(tmp_path)
    graphpeft.hotswap_adapter(models[0], tmp_path, "default")
    assert torch.equal(models[0](X), expected)


def test_copies_share_among_themselves_alone() -> None:
    model: Any = moved(get_peft_model(two_layers(), SharingConfig(**VERA)))
    copied = copy.deepcopy(model)
    first, second = copied.get_submodule("0"), copied.get_submodule("2")
    assert first.default.A is second.default.A
    assert first.default.A is not model.get_submodule("0").default.A
    halved = copied.to(torch.float64)
    assert halved.get_submodule("0").default.A is halved.get_submodule("2").default.A


def test_sites_of_other_shapes_cannot_share() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    with pytest.raises(AdaptError, match=r"TEST_SHARING: 1 and 0 can't share B: .*\(4, 3\).*\(6, 3\)"):
        get_peft_model(model, SharingConfig(r=3, target_modules=["0", "1"]))
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_an_export_with_adapters_as_inputs_needs_all_of_them_in_files(tmp_path: Path) -> None:
    model = moved(get_peft_model(two_layers(), SharingConfig(**VERA, save_projection=False)))
    with pytest.raises(graphpeft.ExportError, match=r"has \['A', 'B'\], which no file has"):
        graphpeft.export(model, (X,), tmp_path / "model.pt2", adapters="inputs")


def test_whole_numbers_stay_whole_whatever_the_model_becomes(tmp_path: Path) -> None:
    model: Any = moved(get_peft_model(two_layers(), PlacesConfig(r=1, target_modules=["0"])))
    expected = model(X)
    model.to(torch.float64).to(torch.float32)
    assert model.get_submodule("0").default.places.dtype == torch.int32
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved["base_model.model.0.shira_indices"].dtype == torch.int32
    assert torch.equal(PeftModel.from_pretrained(two_layers(), tmp_path)(X), expected)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ParameterSpec((6, 6), "w", written_once=True), "w is written once, and has no scope"),
        (ParameterSpec((6, 6), "w", is_saved=False), "w is trained, and isn't saved"),
        (ParameterSpec((6, 6), "w", dtype=torch.int8), r"w is trained, and has whole numbers \(torch.int8\)"),
    ],
)
def test_a_parameter_that_contradicts_itself_is_refused(spec: ParameterSpec, reason: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(OwnTensor, "parameters", lambda self, site, config: {"w": spec})
    with pytest.raises(AdaptError, match=f"OWN_TENSOR: {reason}"):
        get_peft_model(two_layers(), OwnTensorConfig(target_modules=["0"]))


# weights whose use has no name


@dataclass(frozen=True)
class LowRank(DeltaRule):
    """B A for each matrix of a weight, with a change of the bias beside it."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        *stack, rows, columns = site.matrix_shape
        shapes = {"A": (*stack, config.r, columns), "B": (*stack, rows, config.r)}
        return {name: ParameterSpec(shape, key=name) for name, shape in shapes.items()}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        for parameter in parameters.values():
            parameter.normal_()

    def dropout_of(self, config: Any) -> float:
        return config.dropout

    def delta(self, A: Any, B: Any) -> Any:
        return B @ A


@dataclass(kw_only=True)
class LowRankConfig(TargetedConfig):
    peft_type = "LOW_RANK"

    r: int = 2
    dropout: float = 0.0

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return LowRank()


class Experts(nn.Module):
    """Two experts, whose matrices are stored as (in, out) or as (out, in)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.stack = nn.Parameter(torch.randn(2, 6, 4) if is_transposed else torch.randn(2, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(2, -1, -1), self.stack if self.is_transposed else self.stack.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_transposed", [True, False])
def test_a_delta_serves_stacks_of_matrices(is_transposed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base, x = Experts(is_transposed).to(dtype), torch.randn(5, 6).to(dtype)
    model: Any = get_peft_model(nn.Sequential(copy.deepcopy(base)), LowRankConfig(target_modules=["0.stack"]))
    adapted = model.get_submodule("0")
    A, B = adapted.default.stack_A, adapted.default.stack_B
    assert (A.shape, B.shape, A.dtype) == ((2, 2, 6), (2, 4, 2), torch.float32)
    change, exact = (B @ A).to(dtype), copy.deepcopy(base).double()
    with torch.no_grad():
        exact.stack += (B.double() @ A.double()).mT if is_transposed else B.double() @ A.double()
        base.stack += change.mT if is_transposed else change
    # a branch is rounded otherwise than the sum, so it has other bits, and is as near to the exact value
    expected = exact(x.double())
    assert (model(x) - expected).abs().max() < 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert torch.equal(model.merge_and_unload()(x), base(x))


def test_dropout_needs_an_input() -> None:
    config = LowRankConfig(target_modules=["0.stack"], dropout=0.5)
    with pytest.raises(AdaptError, match=r"dropout drops elements of an operation's input.*set it to 0"):
        get_peft_model(nn.Sequential(Experts(True)), config)


def test_dropout_takes_elements_of_the_input_in_training_alone() -> None:
    model = get_peft_model(LINEAR.build(), LowRankConfig(target_modules=["0"], dropout=0.5))
    (x,), own, layer = LINEAR.inputs(), LINEAR.build().get_submodule("0"), model.get_submodule("0")
    change: Any = (layer.default.B @ layer.default.A).T
    torch.testing.assert_close(model.eval()(x), torch.tanh(own(x) + x @ change))
    model.train()
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, torch.tanh(own(x) + nn.functional.dropout(x, 0.5) @ change))


@pytest.mark.parametrize("case", [LINEAR, CONV_1D, CONV_2D, CONV_3D], ids=str)
def test_a_change_of_the_bias_is_added_and_merged(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithBias(LoHa):
        def parameters(self, site: Any, config: Any) -> Any:
            return {**super().parameters(site, config), "c": ParameterSpec((site.out_features,), key="c")}

        def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
            super().initialise(
                {name: tensor for name, tensor in parameters.items() if name != "c"}, site, config, module
            )

        def bias_delta(self, c: Any) -> Any:
            return c

    monkeypatch.setattr(LoHaConfig, "rule_for", lambda self, site, dtype: WithBias())
    model: Any = get_peft_model(case.build(), LoHaConfig(r=2, alpha=3, target_modules=["0"]))
    with torch.no_grad():
        model.get_submodule("0").default.c.normal_()
    active = moved(model)(*case.inputs())
    torch.testing.assert_close(model.merge_and_unload()(*case.inputs()), active, atol=1e-5, rtol=1e-5)


# on both sides of a layer, and around it


@dataclass(frozen=True)
class Both(InputRule, OperationRule):
    """Scales what goes in and what comes out."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {
            "inner": ParameterSpec((site.in_features,), "inner"),
            "outer": ParameterSpec((site.out_features,), "outer"),
        }

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        for parameter in parameters.values():
            parameter.uniform_(1, 2)

    def enter(self, x: Any, inner: Any) -> Any:
        return x * inner

    def rewrite(self, x: Any, y: Any, outer: Any) -> Any:
        return y * outer + x.sum(-1, keepdim=True)


@dataclass(kw_only=True)
class BothConfig(TargetedConfig):
    peft_type = "BOTH"
    adapts_leaves = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Both()


class Codes(nn.Module):
    """A layer whose weight is quantised, so that its call is the site."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.codes = nn.Buffer(torch.randint(-9, 9, (4, 6), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype))


@pytest.mark.parametrize("make", [Codes, lambda: nn.Linear(6, 4)], ids=["call", "layer"])
@pytest.mark.parametrize("is_traced", [False, True])
def test_a_rule_can_change_both_sides_of_a_layer_or_of_a_call(make: Callable[[], nn.Module], is_traced: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Tanh(), make())
    plain = copy.deepcopy(base)
    model: Any = get_peft_model(trace(base, (X,)) if is_traced else base, BothConfig(target_modules=["1"]))
    model.add_adapter("second", BothConfig(target_modules=["1"]))
    model.set_adapter(["default", "second"])
    layer = model.get_submodule("1")
    x = torch.tanh(X)
    # the second is the nearest to what the layer is given, and to what it returns
    given = x * layer.second.inner
    twice = given * layer.default.inner
    first = plain[1](twice) * layer.default.outer + twice.sum(-1, keepdim=True)
    expected = first * layer.second.outer + given.sum(-1, keepdim=True)
    torch.testing.assert_close(model(X), expected)
    model.delete_adapter("second")
    torch.testing.assert_close(
        model(X),
        plain[1](x * layer.default.inner) * layer.default.outer + (x * layer.default.inner).sum(-1, keepdim=True),
    )
    assert torch.equal(model.unload()(X), plain(X))


@dataclass(frozen=True)
class Nest(BoundaryRule):
    """Shifts what a module is given, and doubles what it returns."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"shift": ParameterSpec((1,), "shift")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["shift"].fill_(0.5)

    def enter(self, inputs: Any, shift: Any) -> Any:
        return {name: value + shift for name, value in inputs.items()}

    def leave(self, output: Any) -> Any:
        return output * 2


@dataclass(kw_only=True)
class NestConfig(TargetedConfig):
    peft_type = "NEST"
    adapts_boundaries = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Nest()


@pytest.mark.parametrize("order", [("both", "nest"), ("nest", "both")], ids=str)
@pytest.mark.parametrize("is_traced", [False, True])
def test_adapters_of_a_call_and_of_its_boundary_keep_what_each_other_enters(
    order: tuple[str, str], is_traced: bool
) -> None:
    torch.manual_seed(0)
    base: Any = nn.Sequential(nn.Tanh(), Codes())
    plain, configs = copy.deepcopy(base), {"both": BothConfig, "nest": NestConfig}
    model: Any = get_peft_model(
        trace(base, (X,)) if is_traced else base, configs[order[0]](target_modules=["1"]), order[0]
    )
    model.add_adapter(order[1], configs[order[1]](target_modules=["1"]))
    model.set_adapter(list(order))
    h, layer = torch.tanh(X), model.get_submodule("1")
    shift, inner, outer = layer.nest.shift, layer.both.inner, layer.both.outer
    # the one that comes later is nearer to the module
    if order == ("both", "nest"):
        expected = plain[1](h * inner + shift) * 2 * outer + (h * inner).sum(-1, keepdim=True)
    else:
        given = (h + shift) * inner
        expected = plain[1](given) * 2 * outer + given.sum(-1, keepdim=True)
    torch.testing.assert_close(model(X), expected)
    alone = {}
    for name in order:
        model.set_adapter(name)
        alone[name] = model(X)
    model.set_adapter(list(order))
    model.delete_adapter(order[0])
    assert torch.equal(model(X), alone[order[1]])
    assert torch.equal(model.unload()(X), plain(X))


# on top of each other


@dataclass(frozen=True)
class Stretched(WeightRule, OperationRule):
    """A factor of each feature that comes out."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"factor": ParameterSpec((site.out_features,), "factor")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["factor"].uniform_(1, 2)

    def rewrite(self, y: Any, factor: Any) -> Any:
        return y * factor

    def delta(self, weight: Any, factor: Any) -> Any:
        return weight * (factor - 1)[:, None]

    def bias_delta(self, bias: Any, factor: Any) -> Any:
        return bias * (factor - 1)


@dataclass(frozen=True)
class Entered(WeightRule, InputRule):
    """A factor of each feature that goes in."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"factor": ParameterSpec((site.in_features,), "factor")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["factor"].uniform_(1, 2)

    def enter(self, x: Any, factor: Any) -> Any:
        return x * factor

    def delta(self, weight: Any, factor: Any) -> Any:
        return weight * (factor - 1)


@dataclass(kw_only=True)
class StretchedConfig(TargetedConfig):
    peft_type = "STRETCHED"

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Stretched()


@dataclass(kw_only=True)
class EnteredConfig(TargetedConfig):
    peft_type = "ENTERED"

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Entered()


OF_EACH_BASE: dict[str, Callable[..., Any]] = {
    "delta": LowRankConfig,
    "shared delta": lambda **targets: SharingConfig(r=3, **targets),
    "delta at places": lambda **targets: PlacesConfig(r=1, **targets),
    "outputs": StretchedConfig,
    "inputs": EnteredConfig,
    "outputs and inputs": BothConfig,
    "boundary": NestConfig,
}


@pytest.mark.parametrize(
    ("first", "second"), [*itertools.combinations_with_replacement(OF_EACH_BASE, 2)], ids=lambda base: base
)
def test_rules_of_each_base_act_on_top_of_each_other_as_they_are_merged(first: str, second: str) -> None:
    one, other = (OF_EACH_BASE[base](target_modules=["0"]) for base in (first, second))
    assert_two_adapters_act_together(two_layers, one, (X,), other, tolerance=1e-5)


# slips of authors


@dataclass(frozen=True)
class OnlyChange(WeightRule):
    parameters, initialise = OwnTensor.parameters, OwnTensor.initialise

    def delta(self, w: Any) -> Any:
        return w


@dataclass(frozen=True)
class Curved(OnlyChange, OperationRule):
    """Has a change of the weight, and does something else."""

    def rewrite(self, y: Any, w: Any) -> Any:
        return y * torch.exp(w[0])

    def unmergeable(self, site: Any) -> str:
        return "it isn't linear"


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (
            OnlyChange(),
            "OnlyChange would do nothing at a Linear, where a rule is an OperationRule or InputRule; .* DeltaRule",
        ),
    ],
)
def test_a_rule_that_would_do_nothing_is_refused(rule: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnTensorConfig, "rule_for", lambda self, site, dtype: rule)
    with pytest.raises(AdaptError, match=reason):
        get_peft_model(two_layers(), OwnTensorConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ({"y": ParameterSpec((6, 6), "w")}, "y is what rules are given by this name"),
        (
            {"w": ParameterSpec((6, 6), "w"), "v": ParameterSpec((6, 6), "w")},
            "w is the name of two parameters in files",
        ),
        (
            {"w": ParameterSpec((6, 6), "w", path="part"), "v": ParameterSpec((6, 6), "v", path="part.w")},
            "part is the path of a parameter, and there is another one at it or inside",
        ),
        (
            {"w": ParameterSpec((6, 6), "w"), "v": ParameterSpec((6, 6), "v", path="w")},
            "w is the path of a parameter, and there is another one at it or inside",
        ),
    ],
)
def test_names_with_two_meanings_are_refused(specs: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnTensor, "parameters", lambda self, site, config: specs)
    with pytest.raises(AdaptError, match=reason):
        get_peft_model(two_layers(), OwnTensorConfig(target_modules=["0"]))


@dataclass(frozen=True)
class Shift(DeltaRule):
    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"shift": ParameterSpec(site.matrix_shape, key="shift")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["shift"].normal_()

    def delta(self, shift: Any) -> Any:
        return shift


@dataclass(frozen=True)
class GroupedShift(Shift):
    held_in = "held"

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"shift": ParameterSpec(site.matrix_shape, key="shift", path="part.shift")}


@dataclass(kw_only=True)
class ShiftConfig(TargetedConfig):
    peft_type = "GROUPED_SHIFT"

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Shift()


def test_tensors_are_in_the_group_and_the_parts_that_a_rule_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphpeft.register(ShiftConfig)

    def build() -> Any:
        torch.manual_seed(2)
        model: Any = get_peft_model(two_layers(), ShiftConfig(target_modules=["0", "2"]))
        model.add_adapter("other", ShiftConfig(target_modules=["0"]))
        return model

    plain, rows = build(), ["default", "other", "__base__"]
    monkeypatch.setattr(ShiftConfig, "rule_for", lambda self, site, dtype: GroupedShift())
    model = build()
    assert {name for name, _ in model.named_parameters() if "shift" in name} == {
        *("0.held.default.part.shift", "0.held.other.part.shift", "2.held.default.part.shift"),
    }
    assert torch.equal(model(X), plain(X))
    assert torch.equal(copy.deepcopy(model)(X), plain(X))
    assert torch.equal(torch.fx.Interpreter(model[0]).run(X), plain[0](X))
    torch.testing.assert_close(model(X[:3], adapter_names=rows), plain(X[:3], adapter_names=rows))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(two_layers(), tmp_path)(X), plain(X))
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(X), plain(X))
    model.delete_adapter("other")
    assert [name for name, _ in model.named_modules() if name.endswith("held")] == ["0.held", "2.held"]
    model.delete_adapter("default")
    assert set(model.state_dict()) == set(two_layers().state_dict())
    assert torch.equal(model(X), two_layers()(X))


def test_a_rule_with_constants_of_its_own_keeps_its_dropout_when_it_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written_methods.Projections, "constants", lambda self, site, config: {"own": 2.0})
    options = {"r": 3, "target_modules": ["0", "2"], "vera_dropout": 0.5}
    get_peft_model(two_layers(), SharingConfig(**options)).save_pretrained(tmp_path)
    model: Any = PeftModel.from_pretrained(two_layers(), tmp_path)
    model.set_adapter("default")
    assert (model.get_submodule("0").default.own, model.get_submodule("0").default.dropout.p) == (2.0, 0.5)


def test_what_is_no_change_of_the_weight_cannot_act_before_what_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnTensorConfig, "rule_for", lambda self, site, dtype: Curved())
    model: Any = get_peft_model(two_layers(), OwnTensorConfig(target_modules=["0"]))
    model.add_adapter("second", MissConfig(r=2, init_weights="bat", target_modules=["0"]))
    before = model(X)
    with pytest.raises(AdaptError, match="what 'default' does there is none"):
        model.set_adapter(["default", "second"])
    assert torch.equal(model(X), before)


def test_an_input_that_is_also_something_else_is_refused() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(x, x, self.w)

    with pytest.raises(AdaptError, match="is more than the input of addmm"):
        get_peft_model(nn.Sequential(Residual()), IA3Config(target_modules=["0.w"], feedforward_modules=["0.w"]))


def test_unsaved_values_of_several_sites_are_those_that_a_fresh_adapter_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbered(self: Any, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["A"].fill_(1 if site.name == "0" else 2)
        parameters["B"].fill_(1)
        parameters["b"].fill_(1)
        parameters["d"].fill_(1)

    monkeypatch.setattr(written_methods.Projections, "initialise", numbered)
    base = two_layers().to(torch.bfloat16)
    model = get_peft_model(
        copy.deepcopy(base), SharingConfig(**VERA, save_projection=False), autocast_adapter_dtype=False
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(loaded.get_submodule("0").default.A, model.get_submodule("0").default.A)


def test_two_tensors_under_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = written_methods.Projections.parameters

    def by_shape(self: Any, site: Any, config: Any) -> Any:
        specs = own(self, site, config)
        return {
            name: spec._replace(scope=f"{name}{spec.shape}") if spec.scope else spec for name, spec in specs.items()
        }

    monkeypatch.setattr(written_methods.Projections, "parameters", by_shape)
    with pytest.raises(AdaptError, match="would write vera_B once each"):
        get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), SharingConfig(r=3, target_modules=["0", "1"]))


# found from outside


@dataclass(frozen=True)
class Times(OperationRule, RunsByRow):
    """A factor of what comes out, with rows of its own."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"t": ParameterSpec((site.out_features,), "t")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["t"].fill_(2)

    def rewrite(self, y: Any, t: Any) -> Any:
        return y * t

    def by_row(self, y: Any, t: Any) -> Any:
        return y * t

    def unmergeable(self, site: Any) -> str:
        return "it multiplies what comes out"


def test_rows_without_an_adapter_have_the_base_whatever_zeros_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnTensorConfig, "rule_for", lambda self, site, dtype: Times())
    model: Any = get_peft_model(two_layers(), OwnTensorConfig(target_modules=["0"]), "a")
    model.add_adapter("b", OwnTensorConfig(target_modules=["0", "2"]))
    got = model(X, adapter_names=["a", "__base__", "b", "a"])
    with model.disable_adapter():
        torch.testing.assert_close(got[1], model(X)[1])
    for row, name in ((0, "a"), (2, "b")):
        model.set_adapter(name)
        torch.testing.assert_close(got[row], model(X)[row])


def test_weights_of_a_change_of_the_bias_are_in_pefts_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Sums(LowRank):
        def bias_delta(self, weight: Any, A: Any) -> Any:
            return weight.sum(1) * A.sum()

    monkeypatch.setattr(LowRankConfig, "rule_for", lambda self, site, dtype: Sums())
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(6, 6))
    own = copy.deepcopy(base)
    model: Any = moved(get_peft_model(base, LowRankConfig(target_modules=["0"])))
    layer = model.get_submodule("0")
    A, B, weight = layer.default.A, layer.default.B, own.get_parameter("0.weight")
    expected = own(X) + X @ (B @ A).T + weight.T.sum(1) * A.sum()
    torch.testing.assert_close(model(X), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(X), expected, atol=1e-4, rtol=1e-4)


class Using(nn.Module):
    """A weight and a bias, used in some way."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.use: Any = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


F = nn.functional
BIASES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "computed": lambda own, x: F.linear(x, own.w, 2 * own.b),
    "of one of two": lambda own, x: F.linear(x, own.w, own.b) + F.linear(x, own.w),
    "read elsewhere": lambda own, x: F.linear(x, own.w, own.b) + own.b,
    "the input": lambda own, x: torch.addmm(x, x, own.w),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_whose_change_has_no_place_is_not_merged(name: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Using(BIASES[name]))
    model: Any = moved(get_peft_model(base, IA3Config(target_modules=["0.w"], feedforward_modules=[])))
    before = model(X[:, :6])
    with pytest.raises(AdaptError, match=r"adds what is computed|add other biases each|is read elsewhere, too"):
        model.merge_adapter()
    assert torch.equal(model(X[:, :6]), before)
    lora: Any = moved(get_peft_model(nn.Sequential(Using(BIASES[name])), LoraConfig(r=2, target_modules=["0.w"])))
    active = lora(X)
    torch.testing.assert_close(lora.merge_and_unload()(X), active, atol=1e-5, rtol=1e-5)


BOTH_WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "product": lambda own, x: x @ own.w + x @ own.w.T,
    "chain": lambda own, x: F.linear(F.linear(x, own.w), own.w.T),
}


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_weight_that_is_read_both_ways_is_for_rules_that_know_both(name: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Using(BOTH_WAYS[name]))
    with pytest.raises(AdaptError, match=r"as \(out, in\) and as \(in, out\), and OutputFactors knows one of them"):
        get_peft_model(base, IA3Config(target_modules=["0.w"], feedforward_modules=[]))
    for config in (LowRankConfig(target_modules=["0.w"]), LoraConfig(r=2, target_modules=["0.w"])):
        model: Any = moved(get_peft_model(copy.deepcopy(base), config))
        active = model(X)
        torch.testing.assert_close(model.merge_and_unload()(X), active, atol=1e-4, rtol=1e-4)


def test_a_diagonal_is_no_product_with_a_matrix() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Using(lambda own, x: torch.einsum("ij,jj->ij", x, own.w)))
    model: Any = moved(get_peft_model(base, LoraConfig(r=2, target_modules=["0.w"])))
    active = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), active)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_a_rule_with_its_own_region_of_autocast_is_refused(
    enabled: bool, around: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(w: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return w @ w

    class Region(OwnTensor):
        def delta(self, w: Any) -> Any:
            return product(w)

    class InFunction(OwnTensor):
        def delta(self, w: Any) -> Any:
            return recorded(product)(w)

    model = two_layers()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
        monkeypatch.setattr(OwnTensorConfig, "rule_for", lambda self, site, dtype: Region())
        with pytest.raises(AdaptError, match=r"computes under torch.autocast\(\).*is `recorded`"):
            get_peft_model(model, OwnTensorConfig(target_modules=["0"]))
        assert set(model.state_dict()) == set(two_layers().state_dict())
        monkeypatch.setattr(OwnTensorConfig, "rule_for", lambda self, site, dtype: InFunction())
        get_peft_model(model, OwnTensorConfig(target_modules=["0"]))


@pytest.mark.parametrize("wrong", ["other shape", "another name"])
def test_what_initialise_exchanges_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def initialise(self: Any, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["w" if wrong == "other shape" else "v"] = torch.zeros(1)

    monkeypatch.setattr(OwnTensor, "initialise", initialise)
    monkeypatch.setattr(OwnTensor, "delta", lambda self, w: w)
    model = two_layers()
    with pytest.raises(AdaptError, match=r"initialise makes . of shape \(1,\)"):
        get_peft_model(model, OwnTensorConfig(target_modules=["0"]))
    assert set(model.state_dict()) == set(two_layers().state_dict())


def test_a_change_of_another_shape_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnTensor, "delta", lambda self, w: w[0])
    model: Any = get_peft_model(two_layers(), OwnTensorConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"delta gives a change of shape \(6,\), and the weight has \(6, 6\)"):
        model.merge_adapter()


@pytest.mark.parametrize("value", [None, 3.0])
def test_a_rule_that_returns_no_value_is_named(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Without(Times):
        def rewrite(self, y: Any, t: Any = None) -> Any:
            return value

    monkeypatch.setattr(OwnTensorConfig, "rule_for", lambda self, site, dtype: Without())
    with pytest.raises(AdaptError, match=f"Without of .* rewrite returns a {type(value).__name__}"):
        get_peft_model(two_layers(), OwnTensorConfig(target_modules=["0"]))


def test_one_that_reads_the_bias_so_far_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class OfBias(OwnTensor):
        def delta(self, w: Any) -> Any:
            return w

        def bias_delta(self, bias: Any, w: Any) -> Any:
            return bias * (w[0] + 1)

    monkeypatch.setattr(OwnTensorConfig, "rule_for", lambda self, site, dtype: OfBias())
    model: Any = get_peft_model(two_layers(), OwnTensorConfig(target_modules=["0"]), "own")
    model.add_adapter("lora", LoraConfig(r=2, lora_bias=True, target_modules=["0"]))
    moved(model)
    model.set_adapter(["own", "lora"])
    both = model(X)
    with pytest.raises(AdaptError, match=r"by 'own' depends on the weight itself.* name 'lora' before 'own'"):
        model.merge_adapter(["lora"])
    assert torch.equal(model(X), both)
    model.set_adapter(["lora", "own"])
    both = model(X)
    model.merge_adapter(["lora"])
    torch.testing.assert_close(model(X), both)


@dataclass(frozen=True)
class ShiftOfBias(WeightRule, OperationRule):
    """Adds to what a layer gives back, and asks for the bias that it changes so."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"shift": ParameterSpec((site.out_features,), key="shift")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: Any) -> None:
        nn.init.ones_(parameters["shift"])

    def rewrite(self, y: Any, shift: Any) -> Any:
        return y + shift

    def bias_delta(self, bias: Any, shift: Any) -> Any:
        return shift + 0 * bias

    def delta(self, weight: Any) -> Any:
        return weight * 0


@dataclass(kw_only=True)
class ShiftOfBiasConfig(TargetedConfig):
    peft_type = "SHIFT_OF_BIAS"

    def rule_for(self, site: Any, dtype: Any) -> ShiftOfBias:
        return ShiftOfBias()


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_change_of_a_bias_that_a_layer_lacks_is_not_dropped(merge: str) -> None:
    graphpeft.register(ShiftOfBiasConfig)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4, bias=False)), ShiftOfBiasConfig(target_modules=["0"]))
    x = torch.ones(2, 4)
    expected = model(x)
    with pytest.raises(AdaptError, match="0 has no bias, into which the change of one could be merged"):
        getattr(model, merge)()
    assert torch.equal(model(x), expected)


def test_a_change_of_a_bias_is_merged_into_it() -> None:
    graphpeft.register(ShiftOfBiasConfig)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), ShiftOfBiasConfig(target_modules=["0"]))
    x = torch.ones(2, 4)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "linear": lambda h, w: nn.functional.linear(h, w),
    "operator": lambda h, w: h @ w.T,
    "cat": lambda h, w: torch.cat([h, h + w[0]], 0)[: h.shape[0]],
    "stack": lambda h, w: torch.stack([h, h * w[0]]).sum(0),
    "where": lambda h, w: torch.where(h > 0, h, h * w[0]),
    "addcmul": lambda h, w: torch.addcmul(h, h, w[0]),
    "einsum": lambda h, w: torch.einsum("...i,oi->...o", h, w),
    "layer_norm": lambda h, w: nn.functional.layer_norm(h, (4,), w[0]),
    "lerp": lambda h, w: torch.lerp(h, h * 2, w[0]),
    "dropout": lambda h, w: nn.functional.dropout(h * w[0], 0.5, False),
}


@pytest.mark.parametrize("side", ["enter", "leave", "both"])
@pytest.mark.parametrize("form", FORMS)
def test_a_boundary_rule_calls_any_function_of_a_value_and_a_parameter(form: str, side: str) -> None:
    @dataclass(frozen=True)
    class AtBoundary(BoundaryRule):
        def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
            return {"w": ParameterSpec((4, 4), key="w")}

        def initialise(self, parameters: Any, site: Any, config: Any, module: Any) -> None:
            torch.manual_seed(5)
            nn.init.normal_(parameters["w"])

        if side != "leave":

            def enter(self, inputs: Any, w: Any) -> Any:
                return {"input": FORMS[form](inputs["input"], w)}

        if side != "enter":

            def leave(self, output: Any, entered: Any, w: Any) -> Any:
                # of what the other function has made, too
                return FORMS[form](output if side == "leave" else torch.addcmul(output, entered["input"], w[0]), w)

    @dataclass(kw_only=True)
    class AtBoundaryConfig(TargetedConfig):
        peft_type = "AT_BOUNDARY"
        adapts_boundaries = True

        def rule_for(self, site: Any, dtype: Any) -> AtBoundary:
            return AtBoundary()

    graphpeft.register(AtBoundaryConfig)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(copy.deepcopy(base), AtBoundaryConfig(target_modules=["0"]))
    x, w = torch.randn(3, 4), next(p for p in model.parameters() if p.requires_grad)
    entered = x if side == "leave" else FORMS[form](x, w)
    y = base[0](entered)
    if side == "both":
        y = torch.addcmul(y, entered, w[0])
    expected = base[1](y if side == "enter" else FORMS[form](y, w))
    torch.testing.assert_close(model(x), expected)
