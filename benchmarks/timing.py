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


@dataclass(frozen=True)
class Effort:
    """How much is done for a row.

    Attributes:
        rounds: How often everything is measured.
        quick: Whether models are as small as possible, since the row only has to show that it runs.
    """

    rounds: int
    quick: bool = False

    def of(self, full: int, least: int) -> int:
        """Returns a size: `least` in a quick run, and `full` in others."""
        return least if self.quick else full


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


def measure(what: str, candidates: Mapping[str, Sampler], effort: Effort) -> Samples:
    """Measures every candidate once per round, in an order that is shuffled anew.

    There is one more round at first, which isn't counted, but not in a quick run.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    uncounted = effort.of(1, 0)
    rounds = effort.rounds + uncounted
    with tqdm(total=rounds * len(names), desc=what, unit="sample", mininterval=1, leave=False) as bar:
        for _ in range(rounds):
            gc.collect()
            random.shuffle(names)
            for name in names:
                samples[name].append(candidates[name]())
                bar.update()
    return {name: seconds[uncounted:] for name, seconds in samples.items()}


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

    @classmethod
    def exactly(cls, ratio: float) -> Ratio:
        """Makes a ratio of numbers that no chance changes."""
        return cls(ratio, ratio, ratio)

    @property
    def interval(self) -> float:
        """Half of the confidence interval."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.median:.3f} ± {self.interval:.3f}"
