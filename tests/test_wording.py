"""Tables in plain text, which people read in a terminal."""

from __future__ import annotations

import pytest

from graphpeft.wording import text_table

pytestmark = pytest.mark.quick("wording")


def test_cells_of_the_widest_column_are_wrapped_where_lines_would_be_long():
    reason = "its forward decides on its inputs; " * 5
    lines = text_table(("site", "because", "share"), [["a", reason.strip(), "1 %"], ["b", "short", "99 %"]], ("share",))
    assert lines[0].split() == ["site", "because", "share"]
    assert max(map(len, lines)) <= 120
    [first, second] = [n for n, line in enumerate(lines) if line.startswith(("a", "b"))]
    assert [line.rpartition("  ")[2] for line in (lines[first], lines[second])] == ["1 %", "99 %"]
    column = lines[0].index("because")
    assert all(line[:column].isspace() for line in lines[first + 1 : second])
    assert " ".join(line[column:].removesuffix("1 %").strip() for line in lines[first:second]) == reason.strip()


def test_tables_that_fit_have_a_line_for_each_row():
    cell = "x y " * 28
    assert text_table(("a", "b"), [["1", cell.strip()]])[2] == f"1  {cell.strip()}"


def test_a_path_stays_in_one_line():
    path = "/folder-of-somebody" * 10
    assert text_table(("adapter", "file"), [["default", path]])[2] == f"default  {path}"
    assert text_table(("file",), [[f"written to {path}"]])[2:] == ["written to", path]
