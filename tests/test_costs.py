"""Nothing costs more than `docs/costs.md` says, and a model with many adapters no more than one with few.

Planted: a walk through a layer's holders, an import of Dynamo, and a block that each load records again.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import counting
import pytest
from counting import Rows

pytestmark = pytest.mark.filterwarnings("ignore")

# all sets are in the sample, since a cost may show in one of them alone
every = pytest.mark.every


def _script() -> Any:
    path = Path(__file__).parents[1] / "evidence" / "costs.py"
    spec = importlib.util.spec_from_file_location("costs_page", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


RECORDED, IS_OF_THIS_PYTHON, IS_OF_THIS_PYTORCH = _script().recorded()


def assert_as_recorded(rows: Rows) -> None:
    """Asserts that counts haven't risen, and that the page has those that have fallen."""
    compared = [what for what in rows if _is_comparable(what)]
    if not compared:
        pytest.skip("docs/costs.md was written with other versions of Python or PyTorch, in which these counts differ")
    both = {what: (RECORDED.get(what, 0), rows[what]) for what in compared}
    risen = {what: (before, now) for what, (before, now) in both.items() if now > before + _varying(what, before)}
    assert risen == {}, "these cost more than docs/costs.md says (before, now)"
    fallen = {what: (before, now) for what, (before, now) in both.items() if now < before - _varying(what, before)}
    assert fallen == {}, "these cost less now: run make costs, so that they stay so"


def _is_comparable(what: str) -> bool:
    """Returns whether a count is the same with the versions of Python and PyTorch that are here."""
    if what.endswith(_OF_PYTHON):
        return IS_OF_THIS_PYTHON and IS_OF_THIS_PYTORCH
    return IS_OF_THIS_PYTORCH or what.endswith(_IN_ALL_VERSIONS)


_OF_PYTHON = (": calls", ": files", ": Python modules")
_IN_ALL_VERSIONS = (": recordings", "Transformers", "holders of 4 layers", "tensors more", "sources more")


def _varying(what: str, count: int) -> float:
    """Returns by how much a count may differ: a few calls depend on the libraries that a process has imported."""
    return 5 + 0.02 * count if what.endswith(": calls") else 0


@every
def test_the_import_brings_what_it_needs_alone() -> None:
    assert_as_recorded(counting.imported())


@every
def test_adapting_costs_as_much_for_each_target() -> None:
    assert_as_recorded(counting.further_targets())


@every
@pytest.mark.parametrize("what", counting.LIFECYCLES)
def test_calls_cost_the_same_with_many_adapters_as_with_few(what: str) -> None:
    rows, growth = counting.lifecycle(what)
    assert_as_recorded(rows)
    assert {call: ratio for call, ratio in growth.items() if ratio > 1.05} == {}


def test_calls_dont_go_through_all_holders() -> None:
    assert_as_recorded(counting.walks())


@pytest.mark.parametrize("method", list(counting.methods()))
def test_a_method_computes_and_keeps_no_more(method: str) -> None:
    assert_as_recorded(counting.of_method(method))


def test_passes_and_traces_cost_no_more() -> None:
    assert_as_recorded(counting.of_passes())
    assert_as_recorded(counting.of_traces())


def test_a_hundred_switches_leave_nothing() -> None:
    assert_as_recorded(counting.left_behind())


def test_the_page_has_three_rows_for_each_method() -> None:
    methods = {what for what in RECORDED if what.partition(":")[0] in {*counting.methods()}}
    assert len(methods) == 3 * len(list(counting.methods()))
