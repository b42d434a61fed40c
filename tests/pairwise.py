"""Sets of parameters that cover what two parameters do together, where the product of all would say no more."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def pairwise(**axes: Iterable[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrises over so many sets that each two values of different axes are together in at least one.

    Args:
        axes: The values of each parameter, or the values by what they are called.
    """
    named = [
        [*values.items()] if isinstance(values, Mapping) else [(str(value), value) for value in values]
        for values in axes.values()
    ]
    sets = [[texts[place] for texts, place in zip(named, places, strict=True)] for places in _covering(map(len, named))]
    return pytest.mark.parametrize(
        list(axes), [pytest.param(*(v for _, v in each), id="-".join(text for text, _ in each)) for each in sets]
    )


def _covering(sizes: Iterable[int]) -> list[tuple[int, ...]]:
    """Returns places in each of several lists, that which brings most new pairs first."""
    product = [*itertools.product(*map(range, sizes))]
    left = {pair for places in product for pair in _pairs(places)}
    found = []
    while left:
        found.append(max(product, key=lambda places: len(left.intersection(_pairs(places)))))
        left.difference_update(_pairs(found[-1]))
    return found


def _pairs(places: tuple[int, ...]) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(enumerate(places), 2))
