"""Checks of merging beside outputs: weights that are read, quantised weights, which round, and sites that refuse."""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx

from graphpeft.adapters.changes import changing_sites
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.testing.comparing import LawError, require_close, require_equal
from graphpeft.testing.runs import run
from graphpeft.testing.snapshots import require_unchanged, snapshot


def require_unmerged_exactly(adapted: Any, inputs: ExampleInputs) -> None:
    """Raises unless a model is as before, bit for bit, when adapters were merged and are taken out again."""
    before = run(adapted, inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "adapters are merged into the quantised weights")
        adapted.merge_adapter()
    adapted.unmerge_adapter()
    require_equal(run(adapted, inputs), before, "unmerged differs from before merging")


def require_read_as_merged(adapted: Any, merged: Any, adapter: Adapter, tolerance: float) -> None:
    """Raises unless who reads a weight that the adapter changes gets the merged one."""
    if isinstance(adapted, fx.GraphModule):
        return
    modules, merged_modules = dict(adapted.named_modules()), dict(merged.named_modules())
    for one in changing_sites(modules, adapter):
        path, name = one.site.owner, one.site.attribute
        found, expected = (getattr(each[path], name).detach() + 0 for each in (modules, merged_modules))
        require_close(
            found, expected, tolerance, f"{one.site.weight}, read while the adapter acts, isn't the merged one"
        )


def require_no_merge(adapted: Any) -> None:
    """Raises unless a model refuses to be merged, and is unchanged then."""
    before = snapshot(adapted)
    try:
        adapted.merge_and_unload()
    except AdaptError:
        require_unchanged(adapted, before, "a merge that is refused")
    else:
        raise LawError("an adapter that says why it can't be merged is merged")
