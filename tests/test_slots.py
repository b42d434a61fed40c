"""Graphs name slots of adapters: what reads through them gets what the adapters in the slots have."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter

from graphpeft import AdaptError, LoraConfig, get_peft_model, names_in_slots, optimize, trace
from graphpeft.adapters.reads import READS
from graphpeft.graph import holders
from graphpeft.graph.tags import TAG
from graphpeft.graph.template import template_of

pytestmark = pytest.mark.quick("graph", "adapters")

NAMES = ["default", "a name", "été-2"]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x), self.w)


class Model(nn.Module):
    """Two equal layers, and a weight that a function reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


def config(rank: int, **options: Any) -> LoraConfig:
    chosen: dict[str, Any] = {"target_modules": ["first", "second"], "target_parameters": ["head.w"]} | options
    return LoraConfig(r=rank, lora_alpha=2 * rank + 1, init_lora_weights=False, **chosen)


def adapted(is_flat: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = Model()
    if is_flat:
        model = trace(model, (torch.ones(2, 6),))
    for number, name in enumerate(NAMES):
        get_peft_model(model, config(number + 1, **options), name)
    return model


def alone(names: list[str], x: Tensor) -> Tensor:
    """Returns what a model computes whose adapters come in another order and act in one slot after the other."""
    model = adapted()
    model.set_adapter(names, inference_mode=True)
    return model.merge_and_unload()(x)


SETS = [[NAMES[0]], [NAMES[1]], [NAMES[2], NAMES[0]], [NAMES[0], NAMES[1]], [NAMES[1], NAMES[2], NAMES[0]], []]


@pytest.mark.parametrize("is_flat", [False, True], ids=["regions", "flat"])
def test_each_adapter_that_acts_has_a_slot(is_flat: bool) -> None:
    model, x = adapted(is_flat), torch.randn(3, 6)
    region = model if is_flat else model.first
    for names in SETS:
        model.set_adapter(names, inference_mode=True)
        torch.testing.assert_close(model(x), alone(names, x))
        assert names_in_slots(region) == dict(enumerate(names))
        if names:
            assert {node.meta[TAG].slot for node in region.graph.nodes if TAG in node.meta} == {*range(len(names))}
            assert f"# slot0 is that of the adapter {names[0]!r}" in region.code
            code = "".join(line for line in region.code.splitlines() if not line.startswith("#"))
            assert not any(name in code for name in NAMES)


@pytest.mark.parametrize("is_flat", [False, True], ids=["regions", "flat"])
def test_a_walk_over_the_nodes_reads_what_the_forward_reads(is_flat: bool) -> None:
    model, x = adapted(is_flat), torch.randn(3, 6)
    for names in SETS[:-1]:
        model.set_adapter(names, inference_mode=True)
        region = model if is_flat else model.second
        assert torch.equal(fx.Interpreter(region).run(x), region(x))
        region.graph.lint()
    assert not any("slot" in name for name in model.state_dict())


def test_adapters_of_other_names_have_the_same_graphs() -> None:
    model = adapted()
    found = set()
    for name in NAMES:
        model.set_adapter(name, inference_mode=True)
        found.add((template_of(model.first), template_of(model.second)))
    [(first, second)] = found
    assert first is second


def test_equal_layers_of_models_inside_have_their_own_adapters_and_that_of_the_model() -> None:
    inner = [get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]), own) for own in NAMES]
    get_peft_model(nn.Sequential(*inner), LoraConfig(target_modules=["0.0", "1.0", "2.0"]), "of all")
    assert [names_in_slots(model[0]) for model in inner] == [{0: own, 1: "of all"} for own in NAMES]


def test_an_edit_of_a_graph_stays_when_other_adapters_come() -> None:
    model, x = adapted(), torch.randn(3, 6)
    model.set_adapter(NAMES[0], inference_mode=True)
    expected = {name: alone([name], x) for name in NAMES}
    output = model.head.graph.output_node()
    with model.head.graph.inserting_before(output):
        output.args = (model.head.graph.call_function(torch.neg, output.args),)
    model.head.recompile()
    for name in NAMES:
        model.set_adapter(name, inference_mode=True)
        torch.testing.assert_close(model(x), -expected[name])


@pytest.mark.parametrize("is_flat", [False, True], ids=["regions", "flat"])
def test_copies_and_pickles_read_what_their_own_adapters_have(is_flat: bool) -> None:
    model, x = adapted(is_flat), torch.randn(3, 6)
    model.set_adapter([NAMES[1], NAMES[2]], inference_mode=True)
    expected, stream = model(x), io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x), expected)
        other.set_adapter(NAMES[0], inference_mode=True)
        torch.testing.assert_close(other(x), alone([NAMES[0]], x))
        assert torch.equal(model(x), expected)


def test_passes_read_what_is_in_a_slot() -> None:
    model, x = adapted(), torch.randn(3, 6)
    optimize(model, ["inplace_addmm", "grouped_products"])
    for names in SETS:
        model.set_adapter(names, inference_mode=True)
        torch.testing.assert_close(model(x), alone(names, x))


@torch._dynamo.config.patch(recompile_limit=64)
def test_a_switch_back_isnt_compiled_again() -> None:
    model, x, counter = adapted(), torch.randn(3, 6), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = []
    with torch.no_grad():
        for names in [*SETS, *SETS]:
            model.set_adapter(names, inference_mode=True)
            torch.testing.assert_close(compiled(x), alone(names, x))
            counts.append(counter.frame_count)
    assert counts[: len(SETS)] == [1, 2, 3, 4, 5, 6]
    assert counts[-1] <= 12
    model.set_adapter(NAMES[0], inference_mode=True)
    # a compiler that looks at graphs doesn't make them the modules' own
    assert template_of(model.first) is template_of(model.second)


# names that could be those of slots


def test_attributes_with_the_name_of_a_slot_are_refused() -> None:
    model: Any = Model()
    model.first.slot3 = 1
    with pytest.raises(AdaptError, match="first has an attribute 'slot3', which graphs read for adapters"):
        get_peft_model(model, config(2))
    assert not any("lora" in name for name, _ in model.named_parameters())
    with pytest.raises(AdaptError, match="can't be an adapter's name: graphs use such names"):
        get_peft_model(Model(), config(2), "slot0")


# models inside of others


@pytest.mark.parametrize("is_outer_first", [False, True])
def test_an_adapted_model_inside_of_another_one_keeps_its_own(is_outer_first: bool) -> None:
    torch.manual_seed(0)
    outer: Any = nn.Sequential(Model(), nn.Linear(4, 4))
    x = torch.randn(3, 6)
    base = copy.deepcopy(outer)
    of_inner = lambda: get_peft_model(outer[0], config(3), "inside")  # noqa: E731
    of_outer = lambda: get_peft_model(  # noqa: E731
        outer, config(2, target_modules=["0.first", "1"], target_parameters=["0.head.w"]), "around"
    )
    for adapt in (of_outer, of_inner) if is_outer_first else (of_inner, of_outer):
        adapt()

    def expected(*names: str) -> Tensor:
        def weight(layer: Any, own: Tensor, prefix: str) -> Tensor:
            for name, rank in (("inside", 3), ("around", 2)):
                if name in names and holders.has_tensor(layer, f"{name}.{prefix}lora_A"):
                    A, B = (layer.get_parameter(f"{name}.{prefix}lora_{factor}") for factor in "AB")
                    own = own + (2 * rank + 1) / rank * (B @ A)
            return own

        y = x
        for own, layer in ((base[0].first, outer[0].first), (base[0].second, outer[0].second)):
            y = F.linear(y, weight(layer, own.weight, ""), own.bias)
        y = F.linear(torch.tanh(y), weight(outer[0].head, base[0].head.w, "w_"))
        return F.linear(y, weight(outer[1], base[1].weight, ""), base[1].bias)

    torch.testing.assert_close(outer(x), expected("inside", "around"))
    outer.set_adapter([])
    torch.testing.assert_close(outer(x), expected("inside"))
    outer[0].set_adapter([])
    torch.testing.assert_close(outer(x), expected())
    outer.set_adapter("around")
    torch.testing.assert_close(outer(x), expected("around"))
    outer[0].set_adapter("inside")
    torch.testing.assert_close(outer(x), expected("around", "inside"))
    outer.unload()
    torch.testing.assert_close(outer(x), expected("inside"))
    outer[0].unload()
    assert torch.equal(outer(x), base(x))
    assert [type(module) for module in outer.modules()] == [type(module) for module in base.modules()]


class Inner(nn.Module):
    """Reads a weight beside the layer that has it."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.w = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.w)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Inner(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)) @ self.inner.called.weight


TARGETS = {
    "inside": (["called"], ["w"], ["called", "w"]),
    "around": (["last"], ["inner.called"], ["last", "inner.w"]),
}
STEPS = st.tuples(st.sampled_from([*TARGETS]), st.lists(st.integers(0, 2), unique=True, min_size=1))


ADDED = [(side, number) for side in TARGETS for number in range(3)]


@given(st.permutations(ADDED), st.lists(STEPS, min_size=1, max_size=6))
def test_adapters_of_a_model_and_of_one_inside_act_in_whichever_order_they_come(added, steps):
    torch.manual_seed(0)
    model = Around()
    parts: dict[str, Any] = {"inside": model.inner, "around": model}
    first = {}
    for side, number in added:
        of_weights = [target for target in TARGETS[side][number] if target.endswith("w")]
        layers = [target for target in TARGETS[side][number] if target not in of_weights]
        config = LoraConfig(
            r=2, lora_alpha=2, target_modules=layers, target_parameters=of_weights, init_lora_weights=False
        )
        if side in first:
            parts[side].add_adapter(f"{side}{number}", config)
        else:
            first[side] = get_peft_model(parts[side], config, f"{side}{number}"), number
    x, acting = torch.randn(3, 6), {side: [number] for side, (_, number) in first.items()}
    for side, numbers in steps:
        acting[side] = numbers
        parts[side].set_adapter([f"{side}{number}" for number in numbers])
        wanted = with_sums(model, [f"{side}{number}" for side in TARGETS for number in acting[side]])
        torch.testing.assert_close(model(x), wanted(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["inner.w", "inner.called"])
def test_an_adapter_that_goes_leaves_those_of_a_model_inside_where_rows_were_asked_for(target: str) -> None:
    torch.manual_seed(0)
    model: Any = Around()
    get_peft_model(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False), "around0")
    x = torch.randn(3, 6)
    inside = target.removeprefix("inner.")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=[inside], init_lora_weights=False)
    model.add_adapter("around1", LoraConfig(r=2, target_modules=["last"], init_lora_weights=False))
    model(x, adapter_names=["around1"] * 3)
    get_peft_model(model.inner, config, "inside0")
    model.set_adapter("around1")
    model.delete_adapter("around0")
    model.delete_adapter("around1")
    torch.testing.assert_close(model(x), with_sums(model, ["inside0"])(x), rtol=1e-4, atol=1e-4)
    model.inner.delete_adapter("inside0")
    assert not any(hasattr(type(module), READS) for module in model.modules())


def with_sums(model: nn.Module, names: list[str]) -> nn.Module:
    """Returns a plain model with the sums of a model's weights and of the changes by adapters."""
    tensors = {path: tensor.detach() for path, tensor in model.named_parameters()}
    plain = Around()
    with torch.no_grad():
        for path, weight in plain.named_parameters():
            weight.copy_(tensors[path])
            around, _, own = path.rpartition(".")
            for name in names:
                start = f"{around}.{name}." + ("" if own == "weight" else f"{own}_")
                if f"{start}lora_A" in tensors:
                    weight += tensors[f"{start}lora_B"] @ tensors[f"{start}lora_A"]
    return plain
