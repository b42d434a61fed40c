"""An adapter's tensors live in a submodule of each module that it adapts, which nobody mistakes for the model's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from graphpeft import (
    AdaptError,
    FrodConfig,
    LoraConfig,
    PveraConfig,
    RandLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from graphpeft.graph.holders import own_modules, tensor_at

pytestmark = pytest.mark.quick("graph", "adapters")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Chain(nn.Sequential):
    """Asks how many members it has, and for the last one."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, input: Tensor) -> Tensor:
        members = [input := layer(input) for layer in self]
        assert self[0](X).shape == X.shape
        return F.linear(members[-1], self.w) / len(self) + self[-1](input)


class Named(nn.ModuleDict):
    """Goes through its members by their names."""

    def __init__(self) -> None:
        super().__init__({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.keys():
            x = self[name](x)
        return F.linear(x, self.w) * sum(1 for _ in self.values())


class Numbered(nn.ModuleList):
    """Goes through its members by their numbers."""

    def __init__(self) -> None:
        super().__init__([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(len(self)):
            x = self[index](x)
        return F.linear(x, self.w)


CONTAINERS = pytest.mark.parametrize("make", [Chain, Named, Numbered, lambda: nn.Sequential(nn.Linear(4, 4))])


def model_with(make: Any) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(make(), nn.Linear(4, 2)).eval()


@CONTAINERS
def test_a_container_computes_as_before_with_its_weight_adapted(make: Any) -> None:
    model = model_with(make)
    expected = model(X)
    target = "0.w" if hasattr(model[0], "w") else "0.0.weight"
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_parameters=[target]))
    assert torch.equal(adapted(X), expected)
    assert torch.equal(copy.deepcopy(adapted)(X), expected)
    with adapted.disable_adapter():
        assert torch.equal(adapted(X), expected)
    base = adapted.unload()
    assert type(base[0]) is type(make())
    assert torch.equal(base(X), expected)


@CONTAINERS
def test_a_container_that_is_fully_trained_computes_as_before(make: Any) -> None:
    model = model_with(make)
    expected = model(X)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["1"], modules_to_save=["0"]))
    assert torch.equal(adapted(X), expected)
    assert len(adapted[0]) == len(make())


def test_a_module_that_calls_all_of_its_children_says_why_it_cannot() -> None:
    class Calls(Chain):
        def forward(self, input: Tensor) -> Tensor:
            for child in self.children():
                input = child(input)
            return input * self.w.mean()

    adapted: Any = get_peft_model(model_with(Calls), LoraConfig(r=2, target_modules=["1"], modules_to_save=["0"]))
    with pytest.raises(RuntimeError, match="calls all of its submodules"):
        adapted(X)


def test_what_exchanges_all_parameters_leaves_each_tensor_in_its_place() -> None:
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights="pissa")
    model: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), config)
    with torch.no_grad():
        model[1].default.weight.mul_(3)
    expected, base = model(X), model[1]._parameters["weight"]
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    assert torch.equal(model(X), expected)
    assert torch.equal(model[1]._parameters["weight"], base)


@pytest.mark.parametrize(
    ("compute", "by"),
    [
        (lambda holder: prune.l1_unstructured(holder, "lora_A", 0.5), "L1Unstructured"),
        (lambda holder: nn.utils.parametrizations.orthogonal(holder, "lora_A"), "Orthogonal"),
    ],
    ids=["pruning", "parametrization"],
)
def test_a_tensor_that_something_else_computes_now_is_named_when_the_adapter_is_saved(
    compute: Any, by: str, tmp_path: Any
) -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    compute(model[0].default)
    with pytest.raises(AdaptError, match=rf"0\.default\.lora_A of adapter 'default' is computed by {by} from other"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("moves", [lambda m: m.double(), lambda m: m.bfloat16().float(), copy.deepcopy])
def test_a_tensor_that_sites_share_is_no_parameter_and_stays_one_tensor(moves: Any) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    model = get_peft_model(model, VeraConfig(r=3, target_modules=["0", "1"]))
    assert {name for name, _ in model.named_parameters() if "vera_A" in name} == set()
    moved = moves(model)
    shared = [moved[n].default.vera_A for n in (0, 1)]
    assert shared[0] is shared[1]
    assert shared[0].dtype == moved[0].weight.dtype


SHARING: dict[str, Any] = {
    "VeRA": VeraConfig(r=3, target_modules=["0", "1"]),
    "PVeRA": PveraConfig(r=3, target_modules=["0", "1"]),
    "RandLoRA": RandLoraConfig(r=3, target_modules=["0", "1"]),
    "VB-LoRA": VBLoRAConfig(r=3, num_vectors=8, vector_length=2, target_modules=["0", "1"]),
    "UniLoRA": UniLoraConfig(r=3, target_modules=["0", "1"]),
}


def sharing(config: Any) -> tuple[Any, list[list[tuple[str, str]]]]:
    """Returns an adapted model, and the places of each tensor that several holders have."""
    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), copy.deepcopy(config))
    places: dict[int, list[tuple[str, str]]] = {}
    for path in ("0", "1"):
        holder = model.get_submodule(path).default
        for name, tensor in (*holder._parameters.items(), *holder._buffers.items()):
            places.setdefault(id(tensor), []).append((path, name))
    return model, [each for each in places.values() if len(each) > 1]


@pytest.mark.parametrize("part", ["the model", "a layer"])
@pytest.mark.parametrize("config", SHARING.values(), ids=SHARING)
def test_tensors_that_are_assigned_are_shared_as_those_before(config: Any, part: str) -> None:
    model, places = sharing(config)
    assert places
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    values = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    other, _ = sharing(config)
    other.load_state_dict(values)
    if part == "the model":
        model.load_state_dict(values, assign=True)
    else:
        for path in ("0", "1"):
            own = {name.removeprefix(f"{path}."): value for name, value in values.items() if name.startswith(path)}
            model.get_submodule(path).load_state_dict(own, assign=True)
    for each in places:
        assert len({id(tensor_at(model.get_submodule(path).default, name)) for path, name in each}) == 1
    assert torch.equal(model(torch.ones(2, 6)), other(torch.ones(2, 6)))
    before = model(torch.ones(2, 6))
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(torch.ones(2, 6)), before)


@pytest.mark.parametrize("config", SHARING.values(), ids=SHARING)
def test_tensors_without_values_are_shared_when_they_get_some(config: Any) -> None:
    model, places = sharing(config)
    expected, values = model(torch.ones(2, 6)), copy.deepcopy(model.state_dict())
    for load in (
        lambda: model.to_empty(device="cpu").load_state_dict(values),
        lambda: model.load_state_dict(values, assign=True),
    ):
        model.to("meta")
        load()
        for each in places:
            assert len({id(tensor_at(model.get_submodule(path).default, name)) for path, name in each}) == 1
        assert torch.equal(model(torch.ones(2, 6)), expected)


def test_a_model_with_places_that_sites_share_has_parameters_of_floating_point_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    model = get_peft_model(model, FrodConfig(target_modules=["0", "1"], sparse_rate=0.2))
    assert all(parameter.is_floating_point() for parameter in model.parameters())
    assert {tensor.dtype for name, tensor in model.named_buffers() if "indices" in name} == {torch.int64}


def test_a_module_of_the_models_own_doesnt_pass_for_a_holder_that_is_gone() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential())
    model[2].add_module("default", nn.Linear(4, 4))
    get_peft_model(model, LoraConfig(target_modules=["0", "1"]))
    model._modules["0"] = nn.Linear(4, 4)
    with pytest.raises(AdaptError, match=r"0\.default\.lora_B of adapter 'default' is gone"):
        model(X)


def test_a_module_of_the_models_own_is_seen_beside_holders_that_other_code_has_taken_away() -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    own = nn.Linear(4, 4)
    model[0].add_module("own", own)
    model.add_adapter("second", LoraConfig(target_modules=["0"]))
    del model[0]._modules["default"]
    assert own_modules(model[0]) == [("own", own)]


def test_holders_that_other_code_has_taken_away_are_no_modules_of_the_models_own() -> None:
    config = LoraConfig(target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    model.add_adapter("second", config)
    del model[0]._modules["default"]
    assert own_modules(model[0]) == []
    with pytest.raises(AdaptError, match="of adapter 'default' is gone"):
        model.set_adapter("default")
