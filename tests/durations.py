"""How long tests take: recorded by `make durations` in durations.json, by function, in seconds for one parameter set.

The slowest files begin, so that no process works alone at the end, and slow functions have fewer sets in `make test`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("durations.json")

RECORDED: dict[str, float] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
"""Seconds for one parameter set, by the node ID of the function; tests that take less than `LEAST` aren't listed."""

LEAST = 0.02


def function_of(nodeid: str) -> str:
    """Returns the node ID of a test without its parameters."""
    return nodeid.partition("[")[0]


def slowest_first(items: list[pytest.Item]) -> None:
    """Sorts tests by the time that their files take; the tests of a file share imports, models and graphs."""
    of_file: defaultdict[Path, float] = defaultdict(float)
    for item in items:
        of_file[item.path] += RECORDED.get(function_of(item.nodeid), 0)
    items.sort(key=lambda item: -of_file[item.path])


def is_there(function: str) -> bool:
    """Returns whether there still is a function, by its node ID."""
    file, *_, name = function.split("::")
    path = FILE.parents[1] / file
    return path.exists() and f"def {name}(" in path.read_text(encoding="utf-8")


class Recorder:
    """A plugin that adds up how long each function takes, and writes the file at the end of a run."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._sets: defaultdict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes one phase of a test."""
        function = function_of(report.nodeid)
        self._seconds[function] += report.duration
        self._sets[function].add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Writes the file, with functions that didn't run as they were."""
        ran = {function: self._seconds[function] / len(sets) for function, sets in self._sets.items()}
        kept = {function: seconds for function, seconds in RECORDED.items() if is_there(function)}
        # by one digit, so that a busy machine hardly changes which tests are in the sample
        slow = {name: float(f"{seconds:.1g}") for name, seconds in {**kept, **ran}.items() if seconds >= LEAST}
        FILE.write_text(json.dumps(dict(sorted(slow.items())), indent=0) + "\n", encoding="utf-8")
