"""Parts of a benchmark, each of which may fail without the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping

from rows import Row

Cases = Mapping[str, Callable[[], Iterable[Row]]]
"""Functions that measure rows, each by the name under which its failure is reported."""


def measured(cases: Cases) -> tuple[list[Row], dict[str, str]]:
    """Returns the rows of all cases that run, and the tracebacks of those that don't, by name."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name, case in cases.items():
        try:
            rows += case()
        except Exception:  # whatever it is, the other cases still run
            failed[name] = traceback.format_exc()
    return rows, failed
