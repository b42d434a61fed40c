"""Times several candidates fairly: interleaved and shuffled, compared by the medians of paired ratios."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

Sampler = Callable[[], float]
"""Returns the seconds of one measurement."""

Samples = Mapping[str, Sequence[float]]
"""The seconds of every round by candidate; the n-th of all candidates belong to one round."""

_LONG_ENOUGH = 0.02
"""The least seconds of a measurement of a short call, which is repeated until then."""


def clock() -> float:
    """Returns the seconds of processor time of this process, which other programs on the machine disturb little.

    Processor time adds up over threads, so with several of them it is the time that passes.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def once(prepare: Callable[[], Any], run: Callable[[Any], object], parts: int = 1) -> Sampler:
    """Times one call of `run` on what `prepare` made, which isn't timed; the result is that of one part of its work."""

    def sample() -> float:
        prepared = prepare()
        gc.collect()
        start = clock()
        run(prepared)
        return (clock() - start) / parts

    return sample


def calls(run: Callable[[], object]) -> Sampler:
    """Times calls of `run`, as many in a row as make up a measurable time; the result is that of one call."""
    number = 0

    def sample() -> float:
        nonlocal number
        number = number or _enough_calls(run)
        start = clock()
        for _ in range(number):
            run()
        return (clock() - start) / number

    return sample


def _enough_calls(run: Callable[[], object]) -> int:
    run()  # the first call may have to prepare something
    start = clock()
    run()
    return math.ceil(_LONG_ENOUGH / (clock() - start))


def measure(what: str, candidates: Mapping[str, Sampler], rounds: int) -> Samples:
    """Measures every candidate once per round, in an order that is shuffled anew; a first round isn't counted."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    with tqdm(total=(rounds + 1) * len(names), desc=what, unit="sample", mininterval=1, leave=False) as bar:
        for _ in range(rounds + 1):
            gc.collect()
            random.shuffle(names)
            for name in names:
                samples[name].append(candidates[name]())
                bar.update()
    return {name: seconds[1:] for name, seconds in samples.items()}


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios within the rounds, with the ends of its 95 % confidence interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], others: Sequence[float]) -> Ratio:
        """Compares two candidates round by round, so that what slows a whole round down cancels out."""
        ratios = sorted(a / b for a, b in zip(ours, others, strict=True))
        # the number of values below the median is binomial: n / 2 ± 1.96 √n / 2
        reach = 0.98 * math.sqrt(len(ratios))
        low = max(math.floor(len(ratios) / 2 - reach), 0)
        return cls(statistics.median(ratios), ratios[low], ratios[-1 - low])

    def __str__(self) -> str:
        return f"{self.median:.3f} ± {(self.high - self.low) / 2:.3f}"


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
        to: What the ratio compares with.
        ratio: The ratio.
        target: What it is to be, if anything.
        shown: How a number of seconds or bytes is written.
    """

    what: str
    base: float | None
    peft: float | None
    ours: float | None
    to: str
    ratio: Ratio
    target: Target | None = None
    shown: Callable[[float], str] = duration

    def cells(self) -> tuple[str, ...]:
        """Returns the texts of the columns."""
        target = (str(self.target), self.target.verdict(self.ratio)) if self.target else ("", "")
        return (
            self.what,
            *("" if value is None else self.shown(value) for value in (self.base, self.peft, self.ours)),
            f"{self.ratio} × {self.to}",
            *target,
        )


HEADER = ("what", "base", "PEFT", "graphpeft", "ratio", "target", "met?")


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as an aligned table."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    lines.insert(1, tuple("─" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
