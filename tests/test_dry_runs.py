"""Calls that change a model for a while and undo it: other threads see nothing of that, and lose no time otherwise."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphpeft import (
    LoHaConfig,
    LoraConfig,
    check_learning,
    conversion_deviation,
    convert_to_lora,
    dry_runs,
    explain,
    get_peft_model,
    show,
    trace,
)
from graphpeft._torch import call_with_hooks
from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.adapters.merging import with_originals
from graphpeft.dry_runs import alone
from graphpeft.learning import LearningReport
from graphpeft.rules.report import Report

pytestmark = pytest.mark.quick("dry_runs")


@pytest.fixture(autouse=True)
def _nobody_waits_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_runs, "_PATIENCE", 60.0)


X = torch.arange(12.0).view(3, 4) / 12
CONFIG = LoHaConfig(r=2, target_modules=["layer"], init_weights=False)


class Meeting(nn.Module):
    """Calls a function in the middle of its forward, and then a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.meet = nn.Linear(4, 4), _nothing

    def forward(self, x: Tensor) -> Tensor:
        self.meet()
        return self.layer(x)


def _nothing() -> None:
    pass


DRY_RUNS: dict[str, Callable[[Any, Path], object]] = {
    "explain": lambda model, _: explain(model, LoraConfig(target_modules=["layer"]), "other", example_inputs=(X,)),
    "check_learning": lambda model, _: check_learning(model, (X,)),
    "conversion_deviation": lambda model, _: conversion_deviation(model, convert_to_lora(model, rank=2), (X,)),
    "show": lambda model, folder: show(model, folder / "picture.html", example_inputs=(X,)),
}


UNDISTURBED: dict[str, Callable[[Any, Path], object]] = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "get_model_status": lambda model, _: model.get_model_status(),
    "convert_to_lora": lambda model, _: convert_to_lora(model, rank=2),
    "trace": lambda model, _: trace(model, (X,)),
    "deepcopy": lambda model, _: copy.deepcopy(model),
}


class Call(threading.Thread):
    """A call of a model in a thread of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(daemon=True)
        self.model, self.output, self.error = model, X, ""
        self.start()

    def run(self) -> None:
        try:
            with torch.no_grad():
                self.output = self.model(X)
        except RuntimeError as error:
            self.error = str(error)


def adapted() -> Any:
    return get_peft_model(Meeting(), CONFIG)


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_call_of_another_thread_waits_for_a_dry_run(name: str, tmp_path: Path) -> None:
    model, owner, calls = adapted(), threading.current_thread(), list[Call]()
    expected = model(X)

    def meet() -> None:
        if threading.current_thread() is owner:
            calls.extend((Call(model), Call(model.layer)))
            calls[-1].join(0.02)
            assert all(call.is_alive() for call in calls)

    model.meet = meet
    DRY_RUNS[name](model, tmp_path)
    assert calls
    for call in calls:
        call.join()
        assert torch.equal(call.output, expected), call.error


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_waits_for_a_call_of_another_thread_that_has_begun(name: str, tmp_path: Path) -> None:
    model, owner = adapted(), threading.current_thread()
    expected, begun, goes_on = model(X), threading.Event(), threading.Event()

    def meet() -> None:
        if threading.current_thread() is not owner:
            begun.set()
            goes_on.wait()
        else:
            assert goes_on.is_set()

    model.meet = meet
    call = Call(model)
    begun.wait()
    threading.Timer(0.05, goes_on.set).start()
    DRY_RUNS[name](model, tmp_path)
    call.join()
    assert torch.equal(call.output, expected), call.error


def test_two_threads_that_read_without_merged_adapters_leave_them_merged() -> None:
    model = adapted()
    model.merge_adapter()
    expected, weight = model(X), model.layer.weight.detach().clone()
    run = threading.Thread(target=lambda: _read(model), daemon=True)
    with with_originals(modules_of(model), known_adapters(model)):
        run.start()
        run.join(0.05)
    run.join()
    assert torch.equal(model.layer.weight, weight)
    assert torch.equal(model(X), expected)


def _read(model: Any) -> None:
    with with_originals(modules_of(model), known_adapters(model)):
        pass


def test_the_call_of_modules_that_somebody_has_exchanged_stays_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = Meeting(), list[str]()

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called.append(type(module).__name__)
        return call_with_hooks(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "_call_impl", counted)
    with alone(model):
        model(X)
    model(X)
    assert called == ["Meeting", "Linear"] * 2


def test_calls_of_other_threads_wait_while_merged_adapters_are_out_of_the_weights() -> None:
    model = adapted()
    model.merge_adapter()
    expected = model(X)
    with with_originals(modules_of(model), known_adapters(model)):
        assert not torch.equal(model(X), expected)
        call = Call(model)
        call.join(0.02)
        assert call.is_alive()
    call.join()
    assert torch.equal(call.output, expected), call.error


@pytest.mark.parametrize("name", UNDISTURBED)
def test_a_call_that_changes_nothing_disturbs_no_call_of_another_thread(name: str, tmp_path: Path) -> None:
    model, is_done = adapted(), threading.Event()
    expected, wrong = model(X), list[Tensor]()

    def work() -> None:
        while not is_done.is_set():
            output = model(X)
            if not torch.equal(output, expected):
                wrong.append(output)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for _ in range(5):
        UNDISTURBED[name](model, tmp_path)
    is_done.set()
    thread.join()
    assert not wrong


def test_the_page_names_these_calls() -> None:
    page = (Path(__file__).parents[1] / "docs/adapters.md").read_text(encoding="utf-8")
    rows = re.search(r"^\| beside \|.*\n.*\n(.*)\n(.*)\n", page, flags=re.MULTILINE)
    assert rows
    named = [re.findall("`(\\w+)`", row) for row in rows.groups()]
    assert named == [[*UNDISTURBED], [*DRY_RUNS]]


def test_a_dry_run_holds_no_calls_of_other_models() -> None:
    model, other = adapted(), Meeting()
    with alone(model):
        call = Call(other)
        call.join(5)
        assert not call.is_alive()
        assert torch.equal(call.output, other(X))


def test_two_dry_runs_wait_for_each_other_at_a_module_that_both_models_have() -> None:
    one, other, reports = Meeting(), Meeting(), list[Report]()
    other.layer = one.layer
    run = threading.Thread(target=lambda: reports.append(explain(other, CONFIG, example_inputs=(X,))), daemon=True)
    with alone(one):
        run.start()
        run.join(0.1)
        one(X)
    run.join()
    assert isinstance(reports[0].learning, LearningReport)


def test_a_forward_that_calls_its_modules_in_threads_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_runs, "_BLOCKED", 0.2)
    model, calls = adapted(), list[Call]()

    def meet() -> None:
        calls.append(Call(model.layer))
        calls[-1].join(3)
        if calls[-1].error:
            raise RuntimeError(calls[-1].error)

    model.meet = meet
    with pytest.raises(RuntimeError, match="A forward that calls its modules in threads of its own"):
        check_learning(model, (X,))
    assert torch.equal(model(X), calls[-1].model(X))


def test_a_dry_run_that_waits_too_long_is_told_and_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_runs, "_PATIENCE", 0.05)
    model, begun, goes_on = Meeting(), threading.Event(), threading.Event()

    def meet() -> None:
        begun.set()
        goes_on.wait()

    model.meet = meet
    call = Call(model)
    begun.wait()
    with pytest.raises(RuntimeError, match=r"another thread runs the Meeting, .* for 0\.05 seconds"):
        explain(model, CONFIG)
    goes_on.set()
    call.join()
    another = Call(model)
    another.join()
    assert torch.equal(another.output, call.output)
    assert nn.Module._call_impl is call_with_hooks


def test_a_recomputation_in_a_backward_isnt_held() -> None:
    model = Meeting()
    x = X.clone().requires_grad_()
    output: Any = checkpoint(model, x, use_reentrant=False)
    with alone(model):
        run = threading.Thread(target=output.sum().backward, daemon=True)
        run.start()
        run.join(10)
        assert not run.is_alive()
