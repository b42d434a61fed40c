"""Benchmarks check what they time, a row that fails hides no other, and the table marks rows that were better."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports one of the benchmarks' modules by its name."""
    # the tests have modules of these names, too, whose classes are pickled by name
    names = [path.stem for path in FOLDER.glob("*.py")]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture
def row(module: Any) -> Callable[..., Any]:
    """Makes a row with this ratio to PEFT, ± 0.01."""
    rows, timing = module("rows"), module("timing")

    def make(ratio: float, what: str = "a step", **options: Any) -> Any:
        measured = timing.Ratio(ratio, ratio - 0.01, ratio + 0.01)
        return rows.Row(what, None, 2.0, 2.0 * ratio, "PEFT", measured, **options)

    return make


def test_adapted_models_have_the_same_gradients_by_the_same_names(module: Any) -> None:
    models = module("models")
    base, tokens = models.llama(16, 1), torch.tensor([[1, 2, 3]])
    gradients = {}
    for library in models.LIBRARIES:
        model = models.adapted(base, library)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients[library] = models.adapter_gradients(model)
    ours, theirs = gradients["graphpeft"], gradients["PEFT"]
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        models.assert_close(name, gradient, theirs[name])


def test_a_case_that_fails_hides_no_other_and_is_reported_with_its_traceback(module: Any, row: Any) -> None:
    def failing() -> Iterator[Any]:
        yield row(0.8, "before it fails")
        raise RuntimeError("no such layer")

    rows, failed = module("cases").measured({"bad": failing, "good": lambda: [row(0.9)]})
    assert [row.what for row in rows] == ["before it fails", "a step"]
    assert failed.keys() == {"bad"}
    assert "RuntimeError: no such layer" in failed["bad"]


def test_a_row_is_marked_where_it_is_worse_than_its_best_by_more_than_its_interval(module: Any, row: Any) -> None:
    records = module("records")
    record = records.Record(best=records.Figure(0.8))
    assert record.is_worse(row(0.82))
    assert not record.is_worse(row(0.81))
    assert not record.is_worse(row(0.5))
    assert not records.Record().is_worse(row(2.0))


def test_a_time_below_an_equal_one_is_no_better_than_equal(module: Any, row: Any) -> None:
    records, equal = module("records"), module("rows").Target.equal()
    record = records.Record(best=records.Figure(0.95))
    assert not record.is_worse(row(1.0, target=equal))
    assert record.is_worse(row(1.02, target=equal))


def test_a_better_row_becomes_the_best_and_a_new_one_gets_a_record(module: Any, row: Any) -> None:
    records = module("records")
    before = {row(0.8).name: records.Record(first=records.Figure(0.9), best=records.Figure(0.8, None, "old"))}
    rows = [row(0.7), row(0.5, "another"), row(0.1, "noise", noise=True)]
    after = records.updated(before, rows, "new")
    assert after["a step, to PEFT"] == ((0.9, None, None), (0.7, 0.01, "new"))
    assert after["another, to PEFT"].best.ratio == 0.5
    assert after["noise, to PEFT"] == (None, None)
    assert records.updated(before, [row(0.85)], "new") == before
    assert records.updated(before, [row(0.7998)], "new") == before  # as it is written, it is equal


def test_a_quick_run_names_records_that_nothing_measured_and_rows_that_have_none(module: Any) -> None:
    wrong = module("records").unmatched({"kept", "new"}, ["kept", "dead"])
    assert wrong.keys() == {"dead", "new"}
    assert "nothing measured it" in wrong["dead"]
    assert "add it" in wrong["new"]


def test_a_run_replaces_the_table_alone(module: Any, row: Any) -> None:
    page, records = module("page"), module("records")
    text = f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n"
    record = records.Record(records.Figure(0.9, 0.02), records.Figure(0.7, 0.01, "abc"))
    new = page.page(text, "a machine", [row(0.8)], {"a step, to PEFT": record})
    assert new.startswith(f"before\n{page.BEGIN}\n\na machine\n\n| what | base |")
    assert new.endswith(f"{page.END}\nafter\n")
    assert "old" not in new
    [line] = [line for line in new.splitlines() if line.startswith("| a step")]
    assert line == ("| a step | | 2 s | 1.6 s | 0.800 ± 0.010 × PEFT | | 0.900 ± 0.020 | 0.700 ± 0.010 (abc) | 🔴 |")
    assert page.page(new, "a machine", [row(0.8)], {"a step, to PEFT": record}) == new


def test_each_row_of_the_table_has_a_record_and_each_record_with_figures_a_row(module: Any) -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = {f"{what}, to {to}" for what, to in re.findall(r"^\| (.+?) \|.*? × (\w+) \|", text, re.MULTILINE)}
    recorded = module("records").read()
    assert rows <= recorded.keys()
    # a new row has none before a run has written the table
    assert {name for name, record in recorded.items() if any(record)} <= rows
