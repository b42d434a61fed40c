"""Checks that adapters can be taken out of weights again, where merging can't be exact: quantised weights round."""

from __future__ import annotations

import warnings
from typing import Any

from graphpeft.graph.inputs import ExampleInputs
from graphpeft.testing.comparing import require_equal
from graphpeft.testing.runs import run


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
