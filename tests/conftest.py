"""What all tests share: no network, one thread, equal random numbers in every run, a compiler that forgets."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
# inductor needn't build and load ten programs to see whether g++ knows this processor: tests would fail if it didn't
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import functools
import gc
import importlib
import shutil
import sys
import types
from collections.abc import Iterator
from typing import Any

import durations
import jinja2
import pytest
import tiers
import torch

from graphpeft.rules import registry
from graphpeft.testing.profiles import load_profile

torch.set_num_threads(1)
# a device that isn't there notes each seed for later, with the stack as text, which took a third of the laws' time
devices: Any = (torch.cuda, torch.xpu, torch.mtia)
for device in devices:
    if not device.is_available():
        device.manual_seed_all = lambda seed: None
# each adapter that is saved compiles the template of its model card, which is the same each time
jinja2.Template = functools.cache(jinja2.Template)
load_profile()
# rarely, since each full collection goes through all libraries; not frozen, since the tracer looks for caches in them
gc.set_threshold(50_000, 50, 1_000)


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tiers.mark_beyond_sample(items)
    durations.slowest_first(items)


def pytest_collection_finish() -> None:
    # a Trainer collects garbage, which takes half a second with all libraries loaded
    memory: Any = sys.modules.get("accelerate.utils.memory")
    if memory is not None:
        memory.gc = types.SimpleNamespace(collect=lambda: 0)
    # each export to ONNX parses the sources of all of onnxscript's operators, which are the same each time
    if "onnxruntime" in sys.modules:
        operators: Any = importlib.import_module("onnxscript._framework_apis.torch_2_5")
        operators.get_torchlib_ops = functools.cache(operators.get_torchlib_ops)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help="write tests/durations.json anew")


def pytest_configure(config: pytest.Config) -> None:
    # with several processes, this one hears of all tests
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(durations.Recorder())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiler() -> None:
    """Forgets the compilations of the tests before, since a process has only eight of a function's code."""
    torch.compiler.reset()


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets the methods that a test registers."""
    monkeypatch.setattr(registry, "_REGISTRY", registry.registered())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    playwright: Any = importlib.import_module("playwright.sync_api")  # of the extra browser
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found is not None, "no Chromium here; Debian's package is called chromium"
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found, args=quiet)
        yield chromium
        chromium.close()
