"""Bars of progress are on stderr, in a terminal alone, and only for what takes longer than two seconds."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphpeft
from graphpeft import LoHaConfig, LoraConfig, progress
from graphpeft.testing import verify

pytestmark = pytest.mark.quick("progress")


class Stream(io.StringIO):
    """What is written to stderr, which may be a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def by_over() -> None:
    for _ in progress.over([1, 2, 3], "going", "things"):
        time.sleep(0.02)


def by_counted() -> None:
    with progress.counted("going", "things") as one_more:
        for _ in range(3):
            time.sleep(0.02)
            one_more()


def by_steps() -> None:
    with progress.steps(2) as step:
        step("going")
        time.sleep(0.1)


WAYS = [by_over, by_counted, by_steps]


def written(monkeypatch: pytest.MonkeyPatch, way: Callable[[], None], is_terminal: bool, seconds: float) -> str:
    """Returns what one way of showing writes to stderr, where bars come after some seconds."""
    stream = Stream(is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS", seconds)
    monkeypatch.setitem(progress._OPTIONS, "delay", seconds)
    # the bars of tests are short
    monkeypatch.setitem(progress._OPTIONS, "mininterval", 0)
    way()
    return stream.getvalue()


@pytest.mark.parametrize("way", WAYS)
def test_what_takes_long_is_shown(way: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "going" in written(monkeypatch, way, is_terminal=True, seconds=0.03)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_done_soon_shows_nothing(way: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(monkeypatch, way, is_terminal=True, seconds=2).strip("\r ") == ""


@pytest.mark.parametrize("way", WAYS)
def test_a_file_gets_no_bars_and_the_process_no_thread(
    way: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()
    assert written(monkeypatch, way, is_terminal=False, seconds=0) == ""
    assert threading.active_count() <= before


def of_trace() -> None:
    graphpeft.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(2, 4),))


def of_verify() -> None:
    config = LoraConfig(r=2, target_modules=["0"])
    verify(nn.Sequential(nn.Linear(4, 4)), config, (torch.randn(2, 4),), quiet=True)


def of_conversion() -> None:
    model = graphpeft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoHaConfig(r=2, target_modules=["0"]))
    graphpeft.convert_to_lora(model, 2, progressbar=True)


def of_explain() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    graphpeft.explain(model, LoraConfig(target_modules=["0"]), example_inputs=(torch.randn(2, 4),))


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (of_trace, ["tracing"]),
        (of_explain, ["finding operations", "checking what learns"]),
        (of_verify, ["1 a fresh adapter changes no output", "9 two adapters act together"]),
        (of_conversion, ["converting to LoRA"]),
    ],
)
def test_long_work_tells_what_it_does(
    work: Callable[[], Any], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = written(monkeypatch, work, is_terminal=True, seconds=0)
    assert all(each in shown for each in told)
    assert written(monkeypatch, work, is_terminal=False, seconds=0) == ""
