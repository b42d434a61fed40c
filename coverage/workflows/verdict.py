"""Whether a workflow holds in both libraries, with the same values."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from workflow import Values, Workflow

CLOSE = {"rel_tol": 1e-3, "abs_tol": 1e-5}


class Outcome(NamedTuple):
    """What came of a workflow in one library: its values, or its error."""

    values: Values | None = None
    error: str = ""


class Row(NamedTuple):
    """A workflow and its two outcomes."""

    workflow: Workflow
    peft: Outcome
    graphpeft: Outcome

    @property
    def verdict(self) -> str:
        """One of: equal, other values, graphpeft alone, PEFT alone, neither."""
        if self.peft.error and self.graphpeft.error:
            return "neither"
        if self.peft.error or self.graphpeft.error:
            return "graphpeft alone" if self.peft.error else "PEFT alone"
        return "equal" if are_close(self.peft.values, self.graphpeft.values) else "other values"


def failed(row: Row) -> bool:
    """Returns whether graphpeft owes its user something: what PEFT does, or a reason for other values."""
    return row.verdict in ("PEFT alone", "neither") or (row.verdict == "other values" and not row.workflow.apart)


def are_close(left: Any, right: Any) -> bool:
    """Returns whether values are equal, numbers within rounding."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(are_close(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(are_close, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, **CLOSE) or (math.isnan(left) and math.isnan(right))
    return left == right
