"""Which tests `make test` runs: of each function a sample of its parameter sets. `make test-all` runs all of them.

A function whose sets start processes, trainers, exports or compilers takes seconds for each, as `durations.json` tells.
The sample has fewer of these.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable

import durations
import pytest

SETS = 3
"""The number of parameter sets of a function in the sample."""

SLOW, SLOWEST = 1.0, 5.0
"""The seconds of a set from which on the sample has one set of a function, and from which on it has none."""


def wanted_of(function: str) -> int:
    """Returns how many parameter sets of a function the sample has."""
    seconds = durations.RECORDED.get(function, 0.0)
    return SETS if seconds < SLOW else 1 if seconds < SLOWEST else 0


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
