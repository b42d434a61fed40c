"""Nothing costs more than `docs/costs.md` says, and a model with many adapters no more than one with few.

In `evidence/mutants/`: a walk through a layer's holders, an import of Dynamo, and one recording too many.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import counting
import pytest
from counting import Rows

# all sets are in the sample, since a cost may show in one of them alone
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.every]


def _script() -> Any:
    path = Path(__file__).parents[1] / "evidence" / "costs.py"
    spec = importlib.util.spec_from_file_location("costs_page", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


RECORDED, (IS_OF_THIS_PYTHON, IS_OF_THIS_PYTORCH, IS_OF_THIS_TRANSFORMERS) = _script().recorded()


def assert_as_recorded(recorded: Rows, count: Callable[[], Rows]) -> None:
    """Asserts that counts have neither risen nor fallen since the page was written."""
    before = _comparable(recorded)
    if not before:
        pytest.skip("docs/costs.md was written with other versions of Python or PyTorch, in which these counts differ")
    now = _comparable(count())
    both = {what: (before.get(what, 0), now.get(what, 0)) for what in before | now}
    # of three thousand operations of a backward, one more or less was seen
    changed = {what: (old, new) for what, (old, new) in both.items() if abs(old - new) > _varying(what, old)}
    assert changed == {}, (
        "these cost another number than docs/costs.md says (before, now): if it fell, or must rise for a reason that "
        "the change gives, run make costs"
    )


def _comparable(rows: Rows) -> Rows:
    return {what: count for what, count in rows.items() if _is_comparable(what)}


def _is_comparable(what: str) -> bool:
    """Returns whether a count is the same with the versions of Python, PyTorch and Transformers that are here."""
    if what.endswith((": calls", ": files", ": Python modules")):
        return IS_OF_THIS_PYTHON and IS_OF_THIS_PYTORCH and (IS_OF_THIS_TRANSFORMERS or "a Llama" not in what)
    # other functions' calls among them, which each release of a library may change
    if what.endswith(counting.GROWTH):
        return False
    return (IS_OF_THIS_PYTORCH and (IS_OF_THIS_TRANSFORMERS or "a Llama" not in what)) or what.endswith(
        _IN_ALL_VERSIONS
    )


def _varying(what: str, count: int) -> int:
    return count // 1000 if ": operations" in what else 0


_IN_ALL_VERSIONS = ("Transformers", "gone through", "tensors more", "sources more")


@pytest.mark.parametrize("group", ["the import and one layer", "adapting"])
def test_a_new_process_makes_no_more_calls(group: str) -> None:
    assert_as_recorded(RECORDED[group], functools.partial(counting.fresh, group))


@pytest.mark.parametrize("what", counting.LIFECYCLES)
def test_calls_cost_the_same_with_many_adapters_as_with_few(what: str) -> None:
    rows = counting.fresh(f"calls on {what}")
    assert {call: percent for call, percent in rows.items() if call.endswith(counting.GROWTH) and percent > 105} == {}
    assert_as_recorded(RECORDED[f"calls on {what}"], lambda: rows)


def test_a_batch_of_more_rows_makes_as_many_calls() -> None:
    rows = counting.fresh("mixed batches")
    assert [rows[f"a mixed batch, the next, 8 {what}: calls"] for what in counting.LIFECYCLES] == [
        rows[f"a mixed batch, 32 rows, 8 {what}: calls"] for what in counting.LIFECYCLES
    ]
    assert_as_recorded(RECORDED["mixed batches"], lambda: rows)


def test_no_call_goes_through_holders() -> None:
    assert {what: number for what, number in counting.walks().items() if number} == {}


@pytest.mark.parametrize("method", list(counting.methods()))
def test_a_method_computes_and_keeps_no_more(method: str) -> None:
    recorded = {what: count for what, count in RECORDED["methods"].items() if what.startswith(f"{method}: ")}
    assert_as_recorded(recorded, functools.partial(counting.of_method, method))


@pytest.mark.parametrize("group", ["prompts", "passes", "traces", "switches"])
def test_what_runs_costs_no_more(group: str) -> None:
    assert_as_recorded(RECORDED[group], counting.GROUPS[group])


def test_the_page_has_the_tables_and_methods_of_the_counts_alone() -> None:
    assert RECORDED.keys() == counting.GROUPS.keys()
    of_methods = {what.partition(": ")[0] for what in RECORDED["methods"]}
    assert of_methods == set(counting.methods())
