"""The conditions on sizes under which a program holds, and the sizes that break them.

PyTorch's exporter follows one way through a model. Where the way depends on sizes, the program has a condition on them,
an expression of sympy such as ``s27 <= 500``, whose symbols are the program's dynamic sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

LARGE = 2_048
"""Sizes and numbers above this are large."""

_NEAR = 8
"""Sizes at most this far from the example's, or as far as a number in a condition, are looked at one by one."""

_DOUBLINGS = 24
"""How often a size is doubled, or halved, to find one that breaks a condition."""

_HIGHEST_DEGREE = 4
"""The highest degree of polynomials in one size whose roots are computed."""


def guards(program: ExportedProgram) -> dict[Any, bool]:
    """Returns the conditions that were met on the way, each with whether the model's own code decides by it."""
    found: dict[Any, bool] = {}
    values = (node.meta.get("val") for node in program.graph.nodes)
    environments = (value.fake_mode.shape_env for value in values if hasattr(value, "fake_mode"))
    for guard in getattr(next(environments, None), "guards", ()):
        found[guard.expr] = found.get(guard.expr, False) or _is_of_model(guard.sloc.framework_loc)
    return found


def _is_of_model(frame: Any) -> bool:
    return not getattr(frame, "filename", "").startswith(os.path.join(os.path.dirname(torch.__file__), ""))


def limits(program: ExportedProgram, symbol: Any) -> list[Any]:
    """Returns the limits of a size as conditions."""
    import sympy  # here, since importing it takes longer than importing this library

    limit = program.range_constraints.get(symbol)
    if limit is None:
        return []
    most = [sympy.Le(symbol, limit.upper)] if limit.upper.is_Integer else []
    # PyTorch takes a dynamic size for 2 or more, which needn't be the model's condition
    return most + ([sympy.Ge(symbol, limit.lower)] if limit.lower > 2 else [])


def breaking(condition: Any, symbol: Any, sizes: Mapping[Any, int]) -> set[int]:
    """Returns some values of one size at which a condition doesn't hold, with the one nearest to the example's."""
    import sympy

    alone = condition.subs({other: size for other, size in sizes.items() if other != symbol})
    size = sizes[symbol]

    def breaks_it(one: int) -> bool:
        try:
            return alone.subs(symbol, one) == sympy.false
        except (ZeroDivisionError, AssertionError):  # a divisor in the condition is 0 or negative at this size
            return False

    wanted = {*sizes.values(), *_around(size, condition), *_roots(alone, symbol)}
    broken = {one for one in wanted if one >= 1 and breaks_it(one)}
    if not broken or breaks_it(size):
        return set()
    inside, outside = size, min(broken, key=lambda one: abs(one - size))
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        inside, outside = (inside, middle) if breaks_it(middle) else (middle, outside)
    return {*broken, outside}


def _around(size: int, condition: Any) -> Iterator[int]:
    """Yields sizes near a size, one by one, and further ones at growing distances."""
    import sympy

    numbers = (abs(int(number)) for number in condition.atoms(sympy.Integer))
    # a remainder repeats itself after its divisor
    reach = max([_NEAR, *(number for number in numbers if number <= LARGE)])
    yield from range(max(1, size - reach), size + reach + 1)
    for doublings in range(_DOUBLINGS):
        yield size << doublings
        yield max(1, size >> doublings)


def _roots(condition: Any, symbol: Any) -> Iterator[int]:
    """Yields whole numbers beside the roots of a relation between polynomials."""
    import sympy

    if not hasattr(condition, "rel_op"):
        return
    try:
        polynomial: Any = sympy.Poly(condition.lhs - condition.rhs, symbol)
    except sympy.PolynomialError:
        return
    for root in polynomial.nroots() if polynomial.degree() <= _HIGHEST_DEGREE else ():
        if root.is_real:
            yield from (round(root) + more for more in (-1, 0, 1))


def has_remainder(condition: Any) -> bool:
    """Returns whether a condition contains a remainder, such as ``s27 % 2 == 0``."""
    import sympy

    return any(type(function).__name__.endswith("Mod") for function in condition.atoms(sympy.Function))


def as_text(condition: Any, names: Mapping[Any, str]) -> str:
    """Returns a condition in Python."""
    import sympy

    named = condition.subs({symbol: sympy.Symbol(name) for symbol, name in names.items()}, simultaneous=True)
    return f"{named.lhs} {named.rel_op} {named.rhs}" if hasattr(named, "rel_op") else str(named)
