"""Which tests `make test` runs: of each function a sample of its parameter sets. `make test-all` runs all of them.

Where a set takes milliseconds, as in a table of cases, all are in the sample, as long as they take half a second
together. Where sets start processes, trainers, exports or compilers, each takes seconds, and the sample has one or
none. `durations.json` has the times; a function that it lacks, such as a new one, counts as one whose sets take 0.02 s.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable

import durations
import pytest

SETS = 3
"""The number of parameter sets of a function in the sample."""

TOGETHER = 0.5
"""The seconds up to which further sets are in the sample."""

SLOW, SLOWEST = 0.5, 3.0
"""The seconds of a set from which on the sample has one set of a function, and from which on it has none."""


def wanted_of(function: str) -> int:
    """Returns how many parameter sets of a function the sample has."""
    seconds = durations.RECORDED.get(function, durations.LEAST)
    if seconds >= SLOW:
        return 1 if seconds < SLOWEST else 0
    return max(SETS, int(TOGETHER / seconds))


def sampled(function: str, sets: int, wanted: int) -> frozenset[int]:
    """Returns which of a function's parameter sets are in the sample, by their places in its list.

    They are spread evenly. They begin at another place for each function, so that each method and each kind of layer,
    which many functions run over, is in the sample of some.

    Args:
        function: The node ID of the function.
        sets: The number of its parameter sets.
        wanted: The number of sets in the sample.
    """
    if sets <= wanted:
        return frozenset(range(sets))
    first = zlib.crc32(function.encode()) % sets
    return frozenset((first + number * sets // wanted) % sets for number in range(wanted))


COLLECTED: dict[str, bool] = {}
"""Whether each test that this run has collected is in the sample, by its node ID."""


def mark_beyond_sample(items: Iterable[pytest.Item]) -> None:
    """Marks the tests that aren't in the sample as `full`, but for functions marked `every`."""
    sets: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        sets[durations.function_of(item.nodeid)].append(item)
    for function, of_function in sets.items():
        count, is_whole = len(of_function), of_function[0].get_closest_marker("every") is not None
        kept = sampled(function, count, count if is_whole else wanted_of(function))
        for place, item in enumerate(of_function):
            COLLECTED[item.nodeid] = place in kept
            if place not in kept:
                item.add_marker("full")
