"""A trace leaves what is around it as it was: Python modules that are imported meanwhile, forks, and caches."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import sys
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import einops
import pytest
import torch
import torch.fx
from einops.layers.torch import Rearrange
from torch import nn

from graphpeft import GuardError, LoraConfig, TraceError, get_peft_model, trace
from graphpeft.tracing.linting import lint

pytestmark = pytest.mark.quick("tracing")

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
LARGER = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))

# imports

FRESH = """
import builtins
import functools

import torch
from torch import arange, as_tensor, is_grad_enabled, zeros
from torch.nn.functional import linear

asks = builtins.isinstance
makes = functools.partial(zeros, 8)
TABLE = {"zeros": zeros}
ONES = torch.ones(8)
NUMBERS = arange(8)
LAYER = torch.nn.Linear(8, 8).eval()


class Helper:
    make = staticmethod(arange)

    def __init__(self, make=zeros):
        self.make = make


def run(layer, x):
    return linear_with_numbers(layer, x) + ONES * NUMBERS + makes()


def linear_with_numbers(layer, x):
    return linear(x, layer.weight) + arange(x.shape[-1])
"""


class Importing(nn.Module):
    """Imports a Python module in its forward, by name and as one inside a package."""

    def __init__(self, name: str):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.name = name

    def forward(self, x):
        fresh = importlib.import_module(self.name)
        return fresh.run(self.layer, x)


class Held(nn.Module):
    """Has a weight, and no forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))


class ImportingInARegion(Importing):
    def __init__(self, name: str):
        super().__init__(name)
        self.layer = Held()

    def forward(self, x):
        fresh = importlib.import_module(self.name)
        return fresh.linear_with_numbers(self.layer, x)


class ImportingWhereItIsKept(Importing):
    """Decides on a value, so that it stays a call, which runs on example values."""

    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    package = tmp_path / f"fresh_{abs(hash(request.node.name))}"
    package.mkdir()
    (package / "__init__.py").write_text("from torch import full\n")
    (package / "inner.py").write_text(FRESH)
    monkeypatch.syspath_prepend(tmp_path)
    yield f"{package.name}.inner"
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


def _assert_as_without_a_trace(name: str) -> None:
    package, inner = sys.modules[name.partition(".")[0]], sys.modules[name]
    assert package.full is torch.full
    assert inner.arange is inner.Helper.make is torch.arange
    assert (
        inner.zeros is inner.makes.func is inner.TABLE["zeros"] is inner.Helper.__init__.__defaults__[0] is torch.zeros
    )
    assert inner.is_grad_enabled is torch.is_grad_enabled
    assert inner.as_tensor is torch.as_tensor
    assert inner.asks is isinstance
    assert type(inner.ONES) is type(inner.NUMBERS) is torch.Tensor
    assert inner.LAYER(torch.ones(8)).shape == (8,)
    assert inner.LAYER.training is False
    assert type(inner.__loader__).__name__ == type(vars(inner.__spec__)["loader"]).__name__ == "SourceFileLoader"


@pytest.mark.parametrize("cls", [Importing, ImportingWhereItIsKept])
def test_what_a_forward_imports_while_it_is_traced_is_what_it_is_without_a_trace(fresh: str, cls: Any):
    model = nn.Sequential(cls(fresh), nn.Linear(8, 8))
    finders = list(sys.meta_path)
    traced = trace(model, (X,))
    assert sys.meta_path == finders
    _assert_as_without_a_trace(fresh)
    for x in (X, LARGER):
        assert torch.equal(traced(x), model(x))


def test_what_a_region_imports_is_what_it_is_without_a_trace(fresh: str):
    model = nn.Sequential(ImportingInARegion(fresh), nn.Linear(8, 8))
    adapted = get_peft_model(model, LoraConfig(target_parameters=["layer.weight"], r=2, init_lora_weights=False))
    _assert_as_without_a_trace(fresh)
    found: Any = adapted(X)
    merged: Any = adapted.merge_and_unload()
    torch.testing.assert_close(merged(X), found)


def test_an_import_that_fails_is_the_models_error(fresh: str, tmp_path: Path):
    (tmp_path / fresh.partition(".")[0] / "inner.py").write_text("from torch import no_such_function\n")
    with pytest.raises(TraceError, match="cannot import name 'no_such_function'"):
        trace(Importing(fresh), (X,))
    assert torch.arange(3).tolist() == [0, 1, 2]


# forks


class Waiting(nn.Module):
    """Lets another thread go on while it is traced."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.is_running = threading.Event()
        self.may_end = threading.Event()

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def forward(self, x):
        self.is_running.set()
        self.may_end.wait(2)
        return self.layer(x) + torch.arange(8)


@pytest.mark.parametrize(
    "make", [lambda: nn.LSTM(8, 8), lambda: nn.MultiheadAttention(8, 2)], ids=["lstm", "attention"]
)
def test_a_module_whose_call_is_recorded_keeps_its_tensors_for_other_threads(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer: Any = make()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(*[x] * (1 if isinstance(self.layer, nn.LSTM) else 3))[0]

    model = Outer()
    layer = model.layer
    own, forward = list(layer.parameters()), type(layer).forward
    kept: list[bool] = []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(all(now is before for now, before in zip(layer.parameters(), own, strict=True)))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(layer), "forward", watched)
    trace(model, (X,))
    assert kept
    assert all(kept)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_a_fork_during_another_threads_trace_can_trace_and_run():
    model, other = Waiting(), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    thread = threading.Thread(target=lambda: trace(model, (X,)))
    thread.start()
    assert model.is_running.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python, since there is another thread
        child = os.fork()
    if child == 0:
        is_right = False
        try:
            # what would run in a test's process again must not: only the answer leaves this one
            is_right = pickle.loads(pickle.dumps(torch.arange)) is torch.arange
            is_right &= torch.equal(trace(other.eval(), (X,))(X), other(X))
            is_right &= type(torch.ones(3)) is torch.Tensor
        finally:
            os._exit(0 if is_right else 1)
    model.may_end.set()
    thread.join(10)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# caches of functions


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8)


class ByEinops(Heads):
    def forward(self, x):
        q = einops.rearrange(self.q(x), "b n (h d) -> b h n d", h=2)
        k = einops.rearrange(self.k(x), "b n (h d) -> b h n d", h=2)
        return einops.reduce(q * k, "b h n d -> b n (h d)", "sum")


class OfOneTensor(Heads):
    def forward(self, x):
        left, right = (einops.rearrange(x, "b n (h d) -> b h n d", h=2) for _ in range(2))
        return self.q(einops.rearrange(left + right, "b h n d -> b n (h d)"))


class ByLayers(Heads):
    def __init__(self):
        super().__init__()
        self.split = Rearrange("b n (h d) -> b h n d", h=2)
        self.join = Rearrange("b h n d -> b n (h d)")

    def forward(self, x):
        return self.join(self.split(self.q(x)) * self.split(self.k(x)))


_KEPT = {"mask": functools.lru_cache(lambda n: torch.ones(n)), "half": functools.lru_cache(lambda n: n // 2)}


class ByTable(Heads):
    """Finds a function with a cache in a table, with plain arguments and with traced ones."""

    def forward(self, x):
        return self.q(x) * _KEPT["mask"](8) + _KEPT["half"](x.shape[-1])


@pytest.mark.parametrize("cls", [ByEinops, OfOneTensor, ByLayers, ByTable])
def test_caches_of_functions_give_nothing_of_a_trace_to_other_calls(cls: Any):
    for _ in range(2):
        model = cls()
        traced = trace(model, (X,))
        for x in (X, LARGER):
            assert torch.equal(traced(x), model(x))


def test_a_cache_keeps_nothing_of_a_trace_that_fails():
    class Failing(Heads):
        def forward(self, x):
            x = self.q(x) + _KEPT["half"](x.shape[1])
            return x if x.sum() > 0 else -x

    model = Failing()
    with pytest.raises(TraceError, match="depends on the values of a tensor"):
        trace(model, (X,))
    assert model(X).shape == X.shape


# finished graphs


class Shelf:
    """Keeps what it is given where no trace looks."""

    __slots__ = ("put", "take")

    def __init__(self):
        kept: list[Any] = []
        self.put = functools.partial(list.append, kept)
        self.take = functools.partial(list.__getitem__, kept, 0)


def test_a_value_of_another_trace_in_a_graph_is_an_error_that_says_what_to_do():
    class Keeping(nn.Module):
        def forward(self, x):
            shelf = getattr(sys, "shelf")  # noqa: B009
            shelf.put(x * 2)
            return x + shelf.take()

    sys.shelf = Shelf()  # type: ignore[attr-defined]
    try:
        trace(Keeping(), (X,))
        with pytest.raises(TraceError, match="a value of an earlier trace is used: the model has kept it"):
            trace(Keeping(), (X,))
    finally:
        del sys.shelf  # type: ignore[attr-defined]


def test_a_function_that_holds_a_value_of_a_trace_is_an_error():
    class Holding(nn.Module):
        def forward(self, x):
            return x, functools.partial(max, x * 2)

    with pytest.raises(TraceError, match="that holds traced tensors goes through the graph"):
        trace(Holding(), (X,))


def test_a_size_that_is_asked_for_its_hash_twice_is_a_value_of_the_graph():
    class Hashing(nn.Module):
        def forward(self, x):
            sizes = [x.shape, x.shape]
            return x * sum({size: size[0] for size in sizes}.values()) + sizes[1][1]

    traced = trace(Hashing(), (X,))
    assert torch.equal(traced(X), Hashing()(X))
    with pytest.raises(GuardError):
        traced(LARGER)


def test_a_graph_is_looked_at_before_it_is_returned():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    late = graph.call_function(torch.sigmoid, (x,))
    with graph.inserting_before(late):
        graph.call_function(torch.neg, (late,))
    with pytest.raises(TraceError, match=r"neg, a call of neg, uses sigmoid, .* let that code compute it in each call"):
        lint(graph, {})
    proxy = torch.fx.Proxy(x)
    with pytest.raises(TraceError, match="the SimpleNamespace table holds a value of a trace"):
        lint(torch.fx.Graph(), {"table": types.SimpleNamespace(of=[{"sizes": proxy}])})
    held = torch.fx.Graph()
    held.create_node("call_function", functools.partial(max, proxy), name="held")
    with pytest.raises(TraceError, match="is given a value of a trace inside an object"):
        lint(held, {})


class NamedLikeAFunction(nn.Module):
    """A model with an attribute that is called like a function of its file, which traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.adapting, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapting(x) @ self.w


def adapting(model: nn.Module) -> nn.Module:
    get_peft_model(model, LoraConfig(r=2, target_modules=["adapting", "w"]))
    return trace(model, (X,))


def test_a_function_that_traces_is_none_of_the_models_though_its_name_is_an_attributes():
    model: Any = NamedLikeAFunction()
    for _ in range(2):
        assert torch.equal(adapting(model)(X), model(X))
        model.unload()
