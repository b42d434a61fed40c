"""Each row's ratio at c715d7a and the best that it ever had: records.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rows import Row

RECORDS = Path(__file__).with_name("records.json")


class Figure(NamedTuple):
    """A ratio that was measured, with half of its 95 % confidence interval and the commit, where they are known."""

    ratio: float
    interval: float | None = None
    commit: str | None = None

    def __str__(self) -> str:
        interval = "" if self.interval is None else f" ± {self.interval:.3f}"
        return f"{self.ratio:.3f}{interval}" + (f" ({self.commit})" if self.commit else "")


class Record(NamedTuple):
    """A row's figures."""

    first: Figure | None = None
    best: Figure | None = None

    def beaten(self, row: Row, commit: str) -> Record:
        """Returns this record, with the row's ratio as the best one if it is better."""
        if row.noise or (self.best and row.cost(row.ratio.median) >= row.cost(self.best.ratio)):
            return self
        return self._replace(best=Figure(round(row.ratio.median, 3), round(row.ratio.interval, 3), commit))

    def is_worse(self, row: Row) -> bool:
        """Returns whether the row's ratio is worse than the best one by more than its interval."""
        if self.best is None:
            return False
        return round(row.cost(row.ratio.median) - row.cost(self.best.ratio), 3) > row.ratio.interval


def read() -> dict[str, Record]:
    """Returns the records by names of rows."""
    stored = json.loads(RECORDS.read_text(encoding="utf-8"))
    return {
        name: Record(**{which: Figure(**figure) for which, figure in record.items()}) for name, record in stored.items()
    }


def updated(records: Mapping[str, Record], rows: Sequence[Row], commit: str) -> dict[str, Record]:
    """Returns the records with what the rows improve, and with records of rows that have had none."""
    return {**records, **{row.name: records.get(row.name, Record()).beaten(row, commit) for row in rows}}


def unmatched(rows: Collection[str], recorded: Collection[str]) -> dict[str, str]:
    """Returns the names of records without a row, and of rows without a record, each with what is wrong."""
    lost = {name: "records.json has it, but nothing measured it" for name in recorded if name not in rows}
    return lost | {name: "it isn't in records.json: add it there, as {}" for name in rows if name not in recorded}


def write(records: Mapping[str, Record]) -> None:
    """Writes the records, one a line."""
    lines = (f"{_json(name)}: {_json(_stored(record))}" for name, record in records.items())
    RECORDS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _stored(record: Record) -> dict[str, dict[str, Any]]:
    figures = {which: figure._asdict() for which, figure in record._asdict().items() if figure is not None}
    return {
        which: {key: value for key, value in figure.items() if value is not None} for which, figure in figures.items()
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
