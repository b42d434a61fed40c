"""Whether two computations differ by more than by their roundings.

A model in half precision has other results with an active adapter than with a merged one, since it rounds at other
places. Networks raise roundings, as where they divide by small numbers, so no constant bounds the difference d of the
results. The computations tell the bound themselves: both run again several times with stochastic rounding.

Each run has a difference like d. A fault is in all of them; what two of them differ by is rounding alone. This has four
times the variance that roundings have in d, since there are two runs, and since a stochastic rounding has twice the
variance of one to nearest. The bound is the largest of these values, and so about twice the largest d of a computation
without a fault. They are computed only until d is within it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphpeft.testing.comparing import LawError, apart, require_within, tensors_of
from graphpeft.testing.stochastic_rounding import StochasticRounding

MOST_RUNS = 100
"""How often computations run again before their results differ by more than roundings."""


def require_alike(
    one: Callable[[], Any],
    other: Callable[[], Any],
    tolerance: float,
    law: str,
    base: Callable[[], Any] | None = None,
) -> None:
    """Raises unless two computations give close results: in half precision, as close as their roundings leave them.

    >>> x = torch.ones(2).bfloat16()
    >>> require_alike(lambda: x / 3 + x / 5, lambda: x * (8 / 15), 1e-6, "a sum of fractions isn't theirs")
    """
    found, expected = one(), other()
    try:
        require_within(found, expected, tolerance, law)
    except LawError:
        require_within(found, expected, math.inf, law)  # results of another kind or shape are no rounding
        if (base is not None and not _rounds(base)) or not _roundings_explain(found, expected, one, other, tolerance):
            raise


def require_one_alike(one: Callable[[], Any], others: Sequence[Callable[[], Any]], tolerance: float, law: str) -> None:
    """Raises unless a computation gives results close to those of one of several others, as `require_alike` does."""
    *before, last = others
    for other in before:
        try:
            return require_alike(one, other, tolerance, law)
        except LawError:
            continue
    return require_alike(one, last, tolerance, law)


def _rounds(compute: Callable[[], Any]) -> bool:
    with StochasticRounding(0) as mode:
        compute()
    return mode.has_rounded


def _roundings_explain(
    found: Any, expected: Any, one: Callable[[], Any], other: Callable[[], Any], tolerance: float
) -> bool:
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    chosen = [number for number, (a, b) in enumerate(pairs) if apart(a, b, tolerance) is not None]
    values = [_in_double(pairs[number][1]) for number in chosen]
    differences = _differences(found, expected, chosen)
    sizes, before = _sizes(differences, values), None
    bounds = [0.0] * len(sizes)
    for seed in range(MOST_RUNS):
        with StochasticRounding(seed) as mode:
            now = _differences(one(), other(), chosen)
        if not mode.has_rounded:
            return False
        if before is not None:
            spread = _sizes([a - b for a, b in zip(now, before, strict=True)], values)
            bounds = [max(pair) for pair in zip(bounds, spread, strict=True)]
            if all(size <= bound for size, bound in zip(sizes, bounds, strict=True)):
                return True
        before = now
    return False


def _sizes(differences: list[Tensor], values: list[Tensor]) -> list[float]:
    """Returns three sizes of each difference: of its largest element, of all, and along the results' values."""
    sizes = []
    for difference, value in zip(differences, values, strict=True):
        # along the values roundings cancel each other, and a wrong factor doesn't
        along = (difference * value.nan_to_num()).sum().abs()
        sizes += [difference.abs().max(), difference.norm(), along]
    return [size.nan_to_num(math.inf).item() for size in sizes]


def _differences(found: Any, expected: Any, chosen: list[int]) -> list[Tensor]:
    ours, theirs = tensors_of(found), tensors_of(expected)
    pairs = [(_in_double(ours[number]), _in_double(theirs[number])) for number in chosen]
    # infinite numbers, and NaNs, differ from themselves by NaN
    return [torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b) for a, b in pairs]


def _in_double(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    return tensor.double()
