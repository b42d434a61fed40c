"""A graph runs with gradients and without, as its model does, and has the regions with gradients that the model has."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from graphpeft import GuardError, LoraConfig, get_peft_model, trace
from graphpeft.testing import laws

pytestmark = pytest.mark.quick("tracing")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Recomputes as the models of Diffusers do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gradient_checkpointing = False

    def forward(self, x):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return checkpoint(self.run, x, use_reentrant=False)
        return self.run(x)

    def run(self, x):
        return self.second(F.dropout(self.first(x), 0.25, self.training)) * (2 if self.training else 1)


def two_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


# the question whether there are gradients


@pytest.mark.parametrize("traced_with", [True, False], ids=["traced with", "traced without"])
@pytest.mark.parametrize("training", [True, False])
def test_code_that_asks_for_gradients_in_vain_runs_with_and_without(traced_with, training):
    model = two_blocks().train(training)
    with torch.set_grad_enabled(traced_with):
        traced: Any = trace(model, (X,), strict=True)
    for mode in (False, True):
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                torch.manual_seed(1)
                expected = model.train(mode)(X)
                torch.manual_seed(1)
                found = traced.train(mode)(X)
            assert torch.equal(found, expected)
            assert found.requires_grad == expected.requires_grad
    assert "is_grad_enabled" not in str(traced.report)


@pytest.mark.parametrize("traced_with", [True, False], ids=["traced with", "traced without"])
def test_what_was_asked_beside_it_is_checked_nevertheless(traced_with):
    with torch.set_grad_enabled(traced_with):
        traced: Any = trace(two_blocks(), (X,))
    traced.get_submodule("1").gradient_checkpointing = True
    with pytest.raises(GuardError, match=r"1\.gradient_checkpointing"):
        traced(X)


@pytest.mark.parametrize("traced_with", [True, False], ids=["traced with", "traced without"])
def test_where_the_answer_changes_what_is_computed_it_is_checked(traced_with):
    class Other(nn.Module):
        def forward(self, x):
            return x * 2 if torch.is_grad_enabled() else x * 3

    with torch.set_grad_enabled(traced_with):
        traced: Any = trace(nn.Sequential(Other()), (X,))
        assert torch.equal(traced(X), X * (2 if traced_with else 3))
    with torch.set_grad_enabled(not traced_with), pytest.raises(GuardError, match=r"torch\.is_grad_enabled"):
        traced(X)


class Rounded(nn.Module):
    """Passes a gradient straight through where one is wanted."""

    def forward(self, x):
        return x + (x.round() - x).detach() if x.requires_grad else x.round()


@pytest.mark.parametrize("traced_with", [True, False], ids=["traced with", "traced without"])
def test_a_module_that_asks_whether_a_value_requires_a_gradient_runs_with_and_without(traced_with):
    model = nn.Sequential(nn.Linear(4, 4), Rounded())
    with torch.set_grad_enabled(traced_with):
        traced: Any = trace(model, (X,))
    assert "asks whether a value requires a gradient" in traced.kept["1"]
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert torch.equal(traced(X), model(X))
            assert traced(X).requires_grad is enabled


def test_where_the_other_answer_recomputes_it_is_checked():
    model: Any = two_blocks()
    model[1].gradient_checkpointing = True
    with torch.no_grad():
        traced: Any = trace(model, (X,))
        assert torch.equal(traced(X), model(X))
        assert traced.kept == {}
    with pytest.raises(GuardError, match=r"torch\.is_grad_enabled"):
        traced(X)


def test_an_adapted_region_that_asks_for_gradients_runs_with_and_without():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.gradient_checkpointing = False

        def forward(self, x):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = x * 1
            return F.linear(x, self.w)

    model: Any = get_peft_model(
        nn.Sequential(Functional()),
        LoraConfig(target_modules=[], target_parameters=["0.w"], r=2, lora_alpha=6, init_lora_weights=False),
    )
    expected = model(X)
    with torch.no_grad():
        assert torch.equal(model(X), expected)


# regions with gradients


class Energy(nn.Module):
    """Has gradients inside, whatever there are around."""

    def __init__(self, region: Any = torch.enable_grad):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.region = region

    def forward(self, x) -> Any:
        with self.region():
            y = F.linear(x, self.w)
            asked = torch.is_grad_enabled()
        with torch.no_grad():
            z = F.linear(x, self.w)
            with self.region():
                z = z + F.linear(x, self.w * 2)
        return y, z, F.linear(x, self.w), asked


class Decorated(Energy):
    @torch.enable_grad()
    def energy(self, x):
        return F.linear(x, self.w)

    def forward(self, x):
        return self.energy(x), F.linear(x, self.w)


def set_on() -> Any:
    return torch.set_grad_enabled(True)


BUILDS = {"enable_grad": Energy, "set_grad_enabled": lambda: Energy(set_on), "a decorator": Decorated}


@pytest.mark.parametrize("traced_with", [True, False], ids=["traced with", "traced without"])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_region_with_gradients_has_them_whatever_is_around(build, traced_with):
    model = build()
    with torch.set_grad_enabled(traced_with):
        traced: Any = trace(nn.Sequential(model), (X,), strict=True)
    for each in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                found, expected = each(X), model(X)
                assert torch.is_grad_enabled() == enabled
            laws.require_equal(found, expected, "the traced model")
            for a, b in zip(found, expected, strict=True):
                assert getattr(a, "requires_grad", None) == getattr(b, "requires_grad", None)


def test_the_gradients_of_a_region_are_those_of_the_model():
    model = Energy()
    traced: Any = trace(model, (X,))

    def gradient(of: Any) -> torch.Tensor:
        with torch.no_grad():
            y, z, _, _ = of(X)
        return torch.autograd.grad((y.square().sum() + z.square().sum()), of.w)[0]

    assert torch.equal(gradient(traced), gradient(model))


def test_a_run_that_fails_inside_of_a_region_leaves_it():
    class Failing(nn.Module):
        def forward(self, x):
            with torch.enable_grad():
                return x * 2 if x.shape[0] == 3 else x

    traced: Any = trace(Failing(), (X,))
    with torch.no_grad():
        with pytest.raises(GuardError):
            traced(X[:2])
        assert not torch.is_grad_enabled()


def test_a_region_with_gradients_is_compiled_and_exported():
    model = Decorated()
    traced: Any = trace(model, (X,))
    compiled: Any = torch.compile(traced, fullgraph=True, backend="eager")
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            laws.require_equal(compiled(X), model(X), "compiled")
            assert torch.is_grad_enabled() == enabled
    laws.require_close(torch.export.export(traced, (X,)).module()(X), model(X), 1e-6, "exported")


# writes that assign


class Counting(nn.Module):
    steps: torch.Tensor
    mean: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.steps += 1
        with torch.no_grad():
            self.mean *= 0.5
            self.mean += x.mean(0)
        return x - self.mean * self.steps


@pytest.mark.parametrize("build", [Counting, lambda: nn.Sequential(Counting(), Counting())], ids=["itself", "inside"])
def test_an_operator_that_writes_into_a_buffer_is_a_write(build):
    model, traced_from = build(), build()
    traced: Any = trace(traced_from, (X,), strict=True)
    assert traced.report.not_kept == ()
    for x in (X, 2 * X, X[:2]):
        assert torch.equal(traced(x), model(x))
    laws.require_equal(dict(traced_from.named_buffers()), dict(model.named_buffers()), "the buffers")


def test_a_buffer_that_is_replaced_is_no_write():
    class Replacing(Counting):
        def forward(self, x):
            self.steps = self.steps + 1
            return x * self.steps

    traced: Any = trace(nn.Sequential(Replacing()), (X,))
    assert list(traced.kept) == ["0"]


class AskingForTheFunction(nn.Module):
    """Decides on how a tensor was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(self.linear(x), self.w)
        return y * 2 if y.grad_fn is None else y * 3


@pytest.mark.parametrize("traced_with", [True, False], ids=["traced with", "traced without"])
def test_a_decision_on_the_function_of_a_gradient_is_checked(traced_with):
    model, x = AskingForTheFunction(), torch.randn(2, 4)
    with torch.set_grad_enabled(traced_with):
        traced = trace(model, (x,))
    assert torch.equal(traced(x), model(x))
    with torch.no_grad(), pytest.raises(GuardError, match=r"if y\.grad_fn is None"):
        traced(x)


def test_a_decision_on_the_function_of_a_gradient_is_checked_in_an_adapted_module():
    model, x = AskingForTheFunction(), torch.randn(2, 4)
    with torch.no_grad():
        base = model(x)
        get_peft_model(model, LoraConfig(r=2, target_modules=["w"]))
    for enabled, scale in ((True, 1.5), (False, 1.0)):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(model(x), base * scale)
