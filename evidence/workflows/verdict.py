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
    def difference(self) -> str:
        """Where the values first differ."""
        return difference(self.peft.values, self.graphpeft.values)

    @property
    def verdict(self) -> str:
        """One of: equal, other values, graphpeft alone, PEFT alone, neither."""
        if self.peft.error and self.graphpeft.error:
            return "neither"
        if self.peft.error or self.graphpeft.error:
            return "graphpeft alone" if self.peft.error else "PEFT alone"
        return "other values" if self.difference else "equal"


def failed(row: Row) -> bool:
    """Returns whether graphpeft owes its user something: what PEFT does, or a reason why not, or for other values."""
    return row.verdict == "neither" or (row.verdict in ("PEFT alone", "other values") and not row.workflow.apart)


def difference(left: Any, right: Any) -> str:
    """Returns where two values first differ, or nothing."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return next((f"{key}: {found}" for key in left if (found := difference(left[key], right[key]))), "")
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return next((f"{index}: {found}" for index, pair in pairs if (found := difference(*pair))), "")
    if isinstance(left, float) and isinstance(right, float):
        close = math.isclose(left, right, **CLOSE) or (math.isnan(left) and math.isnan(right))
    else:
        close = left == right
    return "" if close else f"{left} in PEFT, {right} here"
