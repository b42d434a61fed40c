"""Checks of adapters for which merged isn't adapted: quantised weights round, and other sites refuse to be merged."""

from __future__ import annotations

import warnings
from typing import Any

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.testing.comparing import LawError, require_equal
from graphpeft.testing.runs import run
from graphpeft.testing.snapshots import require_unchanged, snapshot


def require_unmerged_exactly(adapted: Any, inputs: ExampleInputs) -> None:
    """Raises unless a model is as before, bit for bit, when adapters were merged and are taken out again.

    Args:
        adapted: The model.
        inputs: Inputs of the model.

    Raises:
        LawError: If an output differs.
    """
    before = run(adapted, inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "adapters are merged into the quantised weights")
        adapted.merge_adapter()
    adapted.unmerge_adapter()
    require_equal(run(adapted, inputs), before, "unmerged differs from before merging")


def require_no_merge(adapted: Any) -> None:
    """Raises unless a model refuses to be merged, and is unchanged then.

    Args:
        adapted: The model.

    Raises:
        LawError: If it is merged, or changed.
    """
    before = snapshot(adapted)
    try:
        adapted.merge_and_unload()
    except AdaptError:
        require_unchanged(adapted, before, "a merge that is refused")
    else:
        raise LawError("an adapter that says why it can't be merged is merged")
