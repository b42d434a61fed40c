"""The table of README.md: a run's rows beside their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from records import Record
from rows import Row

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- run.py --write writes from here -->", "<!-- to here -->"
HEADER = ("what", "base", "PEFT", "graphpeft", "ratio", "target", "at c715d7a", "best ever", "worse")


def page(text: str, source: str, rows: Sequence[Row], records: Mapping[str, Record]) -> str:
    """Returns the text of README.md with these rows in the place of its table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [HEADER, ("---",) * len(HEADER), *(_cells(row, records[row.name]) for row in rows)]
    table = "\n".join("".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines)
    return f"{before}{BEGIN}\n\n{source}\n\n{table}\n\n{END}{after}"


def _cells(row: Row, record: Record) -> tuple[str, ...]:
    target, met = row.verdict()
    unmet = {"yes": "", "yes?": " ?", "no": ", missed", "no?": ", missed ?"}.get(met, "")
    first, best = (str(figure or "") for figure in record)
    return *row.figures(), target + unmet, first, best, "🔴" if record.is_worse(row) else ""
