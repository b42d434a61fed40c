"""The lines of the tables, with the targets that their ratios have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from timing import Ratio


@dataclass(frozen=True)
class Target:
    """The values that a ratio may have."""

    least: float
    most: float

    @classmethod
    def at_most(cls, most: float) -> Target:
        """Any ratio up to `most`."""
        return cls(0, most)

    @classmethod
    def equal(cls) -> Target:
        """The same time, give or take 2 %."""
        return cls(0.98, 1.02)

    def verdict(self, ratio: Ratio) -> str:
        """Says if the median meets the target, with a question mark where a limit is within the noise."""
        met = self.least <= ratio.median <= self.most
        unsure = any(ratio.low <= limit <= ratio.high for limit in (self.least, self.most))
        return ("yes" if met else "no") + ("?" if unsure else "")

    def __str__(self) -> str:
        return f"≤ {self.most:.2f}" if self.least == 0 else f"{self.least:.2f} … {self.most:.2f}"


def duration(seconds: float) -> str:
    """Writes a number of seconds."""
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def size(number: float) -> str:
    """Writes a number of bytes."""
    return f"{number / 1e6:.3g} MB"


@dataclass(frozen=True)
class Row:
    """A line of the table: median seconds or bytes, and one ratio with its target.

    Attributes:
        what: What was measured.
        base: The seconds or bytes without any adapter, if that was measured.
        peft: PEFT's.
        ours: This library's.
        to: The other part of the ratio.
        ratio: The ratio.
        target: What it is to be, if anything.
        shown: How a number of seconds or bytes is written.
        noise: Whether the ratio leaves this library out, so that it has no best value.
    """

    what: str
    base: float | None
    peft: float | None
    ours: float | None
    to: str
    ratio: Ratio
    target: Target | None = None
    shown: Callable[[float], str] = duration
    noise: bool = False

    @property
    def name(self) -> str:
        """What the row's record is found by."""
        return f"{self.what}, to {self.to}"

    def cost(self, ratio: float) -> float:
        """Returns a ratio as it is compared with records: as written there, and where 1 is the target, 1 or more."""
        written = round(ratio, 3)
        return max(written, 1.0) if self.target == Target.equal() else written

    def figures(self) -> tuple[str, ...]:
        """Returns the texts of the first columns, up to the ratio."""
        times = ("" if value is None else self.shown(value) for value in (self.base, self.peft, self.ours))
        return self.what, *times, f"{self.ratio} × {self.to}"

    def verdict(self) -> tuple[str, str]:
        """Returns the texts of the target, and of whether it is met."""
        return (str(self.target), self.target.verdict(self.ratio)) if self.target else ("", "")


HEADER = ("what", "base", "PEFT", "graphpeft", "ratio", "target", "met?")


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as an aligned table."""
    lines = [HEADER, *((*row.figures(), *row.verdict()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    lines.insert(1, tuple("─" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
