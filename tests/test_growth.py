"""What a process keeps of adapters that came and went: as much after the first few as after hundreds."""

from __future__ import annotations

import gc
import linecache
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft import LoraConfig, get_peft_model, own_weight, trace
from graphpeft.graph import template as graph_module
from graphpeft.graph.template import Template
from graphpeft.sites import weight_uses
from graphpeft.targeting import pattern_values

RANKS = [2, 3]


@pytest.fixture(autouse=True)
def _own_objects() -> Iterator[None]:
    """Hides the objects of other tests from the collector, since each collection would take a second for them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def build(is_flat: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))
    return trace(model) if is_flat else model


def config(number: int, **options: Any) -> LoraConfig:
    chosen = {"target_modules": ["0", "2"], "r": RANKS[number % 2], "lora_alpha": number % 7 + 1} | options
    return LoraConfig(init_lora_weights=False, **chosen)


def expected(model: Any, names: list[str], x: Tensor) -> Tensor:
    """Returns what a model of explicit weights computes with these adapters."""
    for number, path in enumerate(("0", "2")):
        layer = model.get_submodule(path)
        weight = own_weight(layer)
        for name in names:
            adapter_config = model.peft_config[name]
            if path in adapter_config.target_modules:
                A, B = (layer.get_parameter(f"{name}.lora_{factor}") for factor in "AB")
                weight = weight + adapter_config.lora_alpha / adapter_config.r * (B @ A)
        x = F.linear(x, weight, layer.bias)
        x = torch.tanh(x) if number == 0 else x
    return x


def templates() -> int:
    """Returns how many templates of this test are kept."""
    while gc.collect():
        pass  # what one collection frees may have kept what the next one finds
    return sum(type(known) is Template for known in gc.get_objects())


def sources() -> int:
    """Returns how many sources are kept that were compiled from graphs, here or by fx itself."""
    gc.collect()
    return sum("eval_with_key" in file for file in linecache.cache)


@pytest.mark.parametrize("is_flat", [False, True], ids=["regions", "flat"])
def test_any_sets_of_adapters_share_few_graphs(is_flat: bool) -> None:
    model, x, chance = build(is_flat), torch.randn(3, 6), random.Random(0)
    names = [f"number {number}" for number in range(20)]
    for number, name in enumerate(names):
        get_peft_model(model, config(number), name)
    before = templates()
    for _ in range(100):
        chosen = chance.sample(names, 5)
        model.set_adapter(chosen, inference_mode=True)
        torch.testing.assert_close(model(x), expected(model, chosen, x))
    # for each number of adapters one, of each of the two regions at most
    assert templates() - before <= 2 * 6


@pytest.mark.parametrize("is_flat", [False, True], ids=["regions", "flat"])
def test_adapters_of_new_names_leave_nothing_behind(is_flat: bool) -> None:
    model, x = get_peft_model(build(is_flat), config(0), "first"), torch.randn(3, 6)

    def come_and_go(number: int) -> None:
        name = f"new {number}"
        model.add_adapter(name, config(number))
        model.set_adapter(name)
        torch.testing.assert_close(model(x), expected(model, [name], x))
        model.set_adapter(["first", name])
        torch.testing.assert_close(model(x), expected(model, ["first", name], x))
        model.delete_adapter(name)

    for number in range(5):
        come_and_go(number)
    before = templates(), sources()
    for number in range(5, 60):
        come_and_go(number)
    assert (templates(), sources()) == before


def test_graphs_that_differ_are_forgotten_with_their_source_once_they_are_long_unused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph_module, "_MOST_NODES", 200)
    model, x, chance = build(False), torch.randn(3, 6), random.Random(0)
    names = []
    for number in range(8):
        names.append(f"number {number}")
        # their nodes differ, and so do the graphs of each order
        variants = [{}, {"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}]
        get_peft_model(model, config(number, **variants[number % 4], target_modules=["2"]), names[-1])
    model.eval()
    orders = [chance.sample(names, 4) for _ in range(40)]
    found, before, sources_before = [], templates(), sources()
    for chosen in orders:
        model.set_adapter(chosen, inference_mode=True)
        found.append(model(x))
    assert templates() - before < 20
    assert sources() - sources_before < 60
    for chosen, value in zip(orders, found, strict=True):
        model.set_adapter(chosen, inference_mode=True)
        assert torch.allclose(model(x), value, rtol=0, atol=1e-5)


class Named(nn.Module):
    """A module whose graph depends on a string."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.weight = name, nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self.name.startswith("a") else -F.linear(x, self.weight)


def test_modules_that_differ_in_a_string_dont_all_leave_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "_MOST_NODES", 200)
    x = torch.randn(2, 4)

    def adapt(name: str) -> None:
        model = nn.Sequential(Named(name))
        base = model(x)
        get_peft_model(model, LoraConfig(target_parameters=["0.weight"]))
        assert torch.equal(model(x), base)

    counts = []
    for number in range(160):
        adapt(f"{'ab'[number % 2]}{number}")
        if number in (79, 159):
            counts.append(templates())
    assert counts[1] - counts[0] < 20


def test_expressions_in_configs_are_forgotten() -> None:
    most = pattern_values._endings.cache_info().maxsize
    assert most is not None
    assert most <= 10_000


def test_a_source_is_there_as_long_as_its_module() -> None:
    model = get_peft_model(build(False), config(0))
    file = type(model[0]).forward.__code__.co_filename
    assert "slot0.lora_A" in "".join(linecache.getlines(file))
    linecache.checkcache(file)
    assert "slot0.lora_A" in "".join(linecache.getlines(file))


class Many(nn.Module):
    """One graph with many weights."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(8):
            self.register_parameter(f"w{number}", nn.Parameter(torch.randn(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        weights: Any = (self.w0, self.w1, self.w2, self.w3, self.w4, self.w5, self.w6, self.w7)
        for weight in weights:
            x = torch.tanh(F.linear(x, weight))
        return x


def test_a_graph_is_searched_for_the_uses_of_its_weights_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    uses_of = weight_uses._uses_of

    def noting(path: str, *args: Any) -> Any:
        searched.append(path)
        return uses_of(path, *args)

    monkeypatch.setattr(weight_uses, "_uses_of", noting)
    model: Any = get_peft_model(Many(), LoraConfig(r=2, target_modules=[f"w{number}" for number in range(8)]))
    assert len(model.adapter_report().adapted) == 8
    assert sorted(searched) == [f"w{number}" for number in range(8)]
