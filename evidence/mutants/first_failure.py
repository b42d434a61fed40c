"""A plugin of pytest that notes the id of each test that starts or fails, in the file that `TESTS_NOTED_IN` names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_PLACE = Path(os.environ["TESTS_NOTED_IN"])


def pytest_configure(config: Any) -> None:
    """Makes the tier's marker known also to a project that has no tier, all of whose tests are in it then."""
    config.addinivalue_line("markers", "full: not in the tier of `make test`")


def _note(word: str, test: str) -> None:
    with _PLACE.open("a", encoding="utf-8") as file:
        file.write(f"{word} {test}\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Notes a test that starts: it is to blame if the process never ends."""
    _note("started", nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    """Notes a test that fails, also in its fixtures."""
    if report.failed:
        _note("failed", report.nodeid)


def pytest_collectreport(report: Any) -> None:
    """Notes a file that can't be imported."""
    if report.failed:
        _note("failed", report.nodeid)
