"""Words of errors and reports: values and items, cut to a bounded size, counts, and tables in plain text."""

from __future__ import annotations

import html
import itertools
import reprlib
import textwrap
from collections.abc import Collection, Sequence


def shortened(text: str, most: int = 200) -> str:
    """Returns a string for an error; of a long one, its beginning and its end."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


class _Short(reprlib.Repr):
    """Representations like Python's own, but of bounded size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200
        self.maxlevel = 4


shown = _Short().repr
"""Returns a value as ``repr`` does, cut if it is long or deeply nested."""


def joined(items: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """Joins items for a message: the first ones, and how many more there are."""
    more = [f"… and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def number_of(count: int, one: str, several: str = "") -> str:
    """Returns a count with its noun.

    >>> number_of(1, "site"), number_of(2000, "site"), number_of(0, "entry", "entries")
    ('1 site', '2,000 sites', '0 entries')
    """
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = frozenset()
) -> list[str]:
    """Returns the lines of a table in plain text; in its widest column, cells are wrapped where lines would be long."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    widest = widths.index(max(widths))
    most = max(widths[widest] - sum(widths) - 2 * (len(widths) - 1) + _WIDTH, _NARROWEST)
    table = [[_wrapped(cell, most) if n == widest else [cell] for n, cell in enumerate(row)] for row in (header, *rows)]
    widths[widest] = max(len(line) for row in table for line in row[widest])
    table.insert(1, [["─" * width] for width in widths])
    aligned = [str.rjust if name in numbers else str.ljust for name in header]
    return [
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, line, widths, strict=True)).rstrip()
        for row in table
        for line in itertools.zip_longest(*row, fillvalue="")
    ]


_WIDTH, _NARROWEST = 120, 40
"""How wide a table is to be, and how narrow its widest column may become for that."""


def _wrapped(cell: str, width: int) -> list[str]:
    # paths and code stay whole
    return textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False) if len(cell) > width else [cell]


def as_html(report: object) -> str:
    """Returns what a report prints, for a notebook; it can be a report's ``_repr_html_``."""
    return f'<pre style="line-height: 1.3">{html.escape(str(report))}</pre>'
