"""A pytest plugin that writes down each test's outcome, its error, and which of PEFT's configs it makes.

A line of JSON for each test goes to the folder that the environment variable `PEFT_TESTS_RECORD` names, into a file for
each process.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scope

# What the test that runs has made so far; tests of one process run one after another.
_made: set[str] = set()


def pytest_configure() -> None:
    """Begins to note configs, where PEFT is the library that runs."""
    if "stand_in" not in sys.modules:
        _note_configs(importlib.import_module("peft.config").PeftConfigMixin)
        for name in scope.VARIANTS.values():
            if name:
                _note_configs(getattr(importlib.import_module("peft.tuners.lora.config"), name))


def _note_configs(base: Any) -> None:
    def new(cls: type, *_: Any, **options: Any) -> Any:
        _made.update(scope.words(cls, options))
        return object.__new__(cls)

    base.__new__ = new


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that weren't asked for."""
    asked = os.environ.get("PEFT_TESTS_ONLY")
    if asked:
        wanted = set(Path(asked).read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
        items[:] = [item for item in items if item.nodeid in wanted]


def _in_parameters(item: pytest.Item) -> set[str]:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}  # type: ignore[attr-defined]
    words: set[str] = set()
    for value in parameters.values():
        words |= scope.words(value, {}) if isinstance(value, type) else scope.words(type(value), _attributes(value))
        words |= scope.options(value) if isinstance(value, dict) else set()
    return words


def pytest_runtest_logstart() -> None:
    """Forgets what the test before has made, before the fixtures of this one make anything."""
    _made.clear()
    _asked().clear()


def _attributes(value: Any) -> dict[str, Any]:
    return vars(value) if hasattr(value, "__dict__") else {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Writes a line for each test, at its call, or at its setup if that fails or skips."""
    report = (yield).get_result()  # type: ignore[misc]
    if report.when == "call" or report.outcome != "passed":
        _write(
            {
                "test": item.nodeid,
                "outcome": report.outcome,
                "when": report.when,
                "seconds": round(call.duration, 2),
                "made": sorted(_made | _in_parameters(item)),
                "asked": sorted(_asked()),
                **(_error(call.excinfo) if call.excinfo is not None else {}),
            }
        )


def _asked() -> set[str]:
    """Returns the missing classes that the test asked for instances of, where graphpeft stands for PEFT."""
    return sys.modules["stand_in"].asked if "stand_in" in sys.modules else set()


def _write(line: dict[str, Any]) -> None:
    folder = Path(os.environ["PEFT_TESTS_RECORD"])
    name = os.environ.get("PYTEST_XDIST_WORKER", "main")
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _error(excinfo: Any) -> dict[str, Any]:
    last = _without_addresses(" ".join(f"{excinfo.value}{_instead(excinfo.value)}".split()))
    frames = [(frame.filename, frame.lineno or 0, frame.line or "") for frame in traceback.extract_tb(excinfo.tb)]
    return {
        "error": f"{excinfo.typename}: {last}"[:600],
        "in_test": _innermost(frames, lambda path: "/tests/" in path),
        "raised_at": _innermost(frames, lambda _: True),
    }


def _instead(error: BaseException) -> str:
    """Returns what was raised where a warning was expected, since pytest says only that it didn't come."""
    raised = error.__context__
    return f" Raised: {type(raised).__name__}: {raised}" if "DID NOT WARN" in str(error) and raised else ""


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]{6,}", "0x…", text)


def _innermost(frames: list[tuple[str, int, str]], wanted: Callable[[str], bool]) -> str:
    found = [f"{'/'.join(Path(path).parts[-2:])}:{line}: {text}" for path, line, text in frames if wanted(path)]
    return found[-1][:300] if found else ""
