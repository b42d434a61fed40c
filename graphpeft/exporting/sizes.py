"""The sizes of inputs at which an exported file is checked: sizes that its program accepts, and sizes that it refuses.

A program refuses sizes that break its conditions, which files for other runtimes don't contain.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram

from graphpeft.exporting.example import Shape
from graphpeft.exporting.program import Program

_MORE: tuple[Callable[[int], int], ...] = (lambda size: size + 1, lambda size: 2 * size, lambda size: size - 1)
"""Sizes to try besides the example's; a model may need an even size, or allow no larger size."""

_FAR = 8
"""Sizes up to this multiple of the example's are tried, however large: larger inputs may exhaust memory.

Above the multiple, sizes that aren't large are tried, with batches of two rows at most.
"""


class Break(NamedTuple):
    """Sizes at which a program may not hold.

    Attributes:
        shapes: The shapes of the model's own inputs.
        condition: The condition that they break, in Python; empty if none is known.
        mend: The argument ``dynamic`` that excludes them; empty if there is none.
        is_own: Whether the model's own code decides by the condition, and not code of PyTorch that it calls.
    """

    shapes: tuple[Shape, ...]
    condition: str = ""
    mend: str = ""
    is_own: bool = False


class Place(NamedTuple):
    """A dimension of an input whose size is a symbol."""

    input: int
    dim: int


def accepted(program: Program, shapes: Sequence[Shape]) -> list[list[tuple[Shape, ...]]]:
    """Returns a list of larger shapes and a list of smaller shapes for the model's own inputs.

    Later shapes of a list are for programs that don't accept the earlier shapes.

    Args:
        program: The program.
        shapes: The shapes of the example.
    """
    own = [one.shape for one in program.inputs[: len(shapes)]]
    sizes = dict(_solved(own, shapes))
    first = _of_batches(own)
    larger = [{symbol: _limited(program, symbol, more(size)) for symbol, size in sizes.items()} for more in _MORE]
    ones = {symbol: _limited(program, symbol, 1) for symbol in sizes}
    smaller = [ones, {symbol: ones[symbol] if symbol in first else size for symbol, size in sizes.items()}]
    return [[_shapes_with(values, own, shapes) for values in choices] for choices in (larger, smaller)]


def breaks(program: Program, shapes: Sequence[Shape], are_given: bool) -> tuple[list[Break], list[str]]:
    """Returns sizes at which a program may not hold, and the conditions that only larger sizes than are tried break.

    One size in each is another than the example's: the nearest one that breaks a condition, one that the program fixes,
    one that is elsewhere the same size, or 1.

    Args:
        program: The program.
        shapes: The shapes of the example.
        are_given: Whether the caller has given the dynamic sizes, so that a program's limits may be the caller's. A
            condition that follows from these is none of the program.
    """
    inputs = _Inputs(program, shapes)
    found, too_large = _of_conditions(inputs, are_given)
    found += _apart(inputs)
    if not are_given:
        found += _beyond_fixed(inputs)
        found += [_of_one(inputs, symbol) for symbol in inputs.sizes]
    by_shapes = {one.shapes: one for one in reversed(found) if one.shapes != inputs.shapes}
    return list(reversed(by_shapes.values())), too_large


class _Inputs:
    """The model's own inputs, with the dynamic sizes that are known.

    Args:
        program: The program.
        shapes: The shapes of the example.
    """

    def __init__(self, program: Program, shapes: Sequence[Shape]) -> None:
        self.exported, self.own, self.shapes = program.exported, program.inputs[: len(shapes)], tuple(shapes)
        self.symbolic = [one.shape for one in self.own]
        self.sizes = dict(_solved(self.symbolic, shapes))
        self.places = {symbol: _places(self.symbolic, symbol) for symbol in self.sizes}

    def with_(self, sizes: Mapping[Any, int]) -> tuple[Shape, ...]:
        """Returns the example's shapes with other values of some symbols."""
        return _shapes_with({**self.sizes, **sizes}, self.symbolic, self.shapes)

    def with_one(self, place: Place, size: int) -> tuple[Shape, ...]:
        """Returns the example's shapes with another size at one place."""
        changed = [list(shape) for shape in self.shapes]
        changed[place.input][place.dim] = size
        return tuple(map(tuple, changed))

    def name(self, place: Place) -> str:
        """Returns the Python of a size."""
        return f"{self.own[place.input].name}.shape[{place.dim}]"

    def text(self, condition: Any) -> str:
        """Returns the Python of a condition."""
        names = {symbol: self.name(places[0]) for symbol, places in self.places.items() if places}
        return as_text(condition, names)


def _of_conditions(inputs: _Inputs, are_given: bool) -> tuple[list[Break], list[str]]:
    """Returns the nearest sizes that break each condition, and the conditions whose nearest ones are too large."""
    known = _conditions(inputs, are_given)
    broken = {
        (condition, symbol): values
        for condition in known
        for symbol in sorted(condition.free_symbols, key=str)
        if (values := breaking(condition, symbol, inputs.sizes))
    }
    found: list[Break] = []
    too_large: dict[tuple[Any, int], str] = {}
    for (condition, symbol), values in broken.items():
        example = inputs.sizes[symbol]
        size = min(values, key=lambda one: abs(one - example))
        is_far = size > _FAR * example
        if is_far and size > LARGE:
            too_large.setdefault((symbol, size), inputs.text(condition))
            continue
        others = _of_batches(inputs.symbolic) & inputs.sizes.keys() - condition.free_symbols if is_far else ()
        tried = inputs.with_({**{one: min(inputs.sizes[one], 2) for one in others}, symbol: size})
        # PyTorch doesn't infer from limits that a remainder is another one
        is_limit = condition.free_symbols == {symbol} and not has_remainder(condition)
        # a limit must exclude what breaks any condition on this size alone
        alone = [each for (other, own), each in broken.items() if other.free_symbols == {own} == {symbol}]
        mend = _mend(inputs, symbol, set().union(*alone)) if is_limit else ""
        found.append(Break(tried, inputs.text(condition), mend, known[condition]))
    return found, list(too_large.values())


def _conditions(inputs: _Inputs, are_given: bool) -> dict[Any, bool]:
    """Returns the conditions on known sizes alone, each with whether the model's own code decides by it."""
    found = guards(inputs.exported)
    for symbol in () if are_given else inputs.sizes:
        for limit in limits(inputs.exported, symbol):
            found.setdefault(limit, True)
    return {
        one: is_own for one, is_own in found.items() if one.free_symbols and one.free_symbols <= inputs.sizes.keys()
    }


def _beyond_fixed(inputs: _Inputs) -> Iterator[Break]:
    """Yields shapes in which a size is larger by 1 than the one that the program fixes."""
    for number, shape in enumerate(inputs.symbolic):
        for dim, size in enumerate(shape):
            if not isinstance(size, torch.SymInt):
                place = Place(number, dim)
                larger = inputs.with_one(place, inputs.shapes[number][dim] + 1)
                yield Break(larger, f"{inputs.name(place)} == {size}")


def _apart(inputs: _Inputs) -> Iterator[Break]:
    """Yields shapes in which one of several sizes that a program takes for equal is another."""
    for places in inputs.places.values():
        for place in places[1:]:
            condition = f"{inputs.name(places[0])} == {inputs.name(place)}"
            yield Break(inputs.with_one(place, inputs.shapes[place.input][place.dim] + 1), condition, is_own=True)
            yield Break(inputs.with_one(place, 1), condition)  # which operations broadcast


def _of_one(inputs: _Inputs, symbol: Any) -> Break:
    """Returns shapes with a size of 1: PyTorch takes an open size for more than 1, which is no condition that it tells.

    Where other inputs have this size at the same place, as a mask has the batch of its ids, they may have to be one.
    """
    tried, places = inputs.with_({symbol: 1}), inputs.places[symbol]
    alike = {
        other: found[0]
        for other, found in inputs.places.items()
        if found and inputs.sizes[other] == inputs.sizes[symbol] and places and found[0].dim == places[0].dim
    }
    if len(alike) < 2:
        return Break(tried)
    return Break(tried, " == ".join(map(inputs.name, alike.values())), _as_one(inputs, alike))


def _as_one(inputs: _Inputs, alike: Mapping[Any, Place]) -> str:
    """Returns the argument ``dynamic`` with one ``Dim`` for several sizes, within the limits of all of them."""
    ranges = inputs.exported.range_constraints
    limits = [ranges[symbol] for symbol in alike if symbol in ranges]
    least = max((int(limit.lower) for limit in limits if limit.lower > 2), default=None)
    most = min((int(limit.upper) for limit in limits if limit.upper.is_Integer), default=None)
    return _dynamic(inputs, alike.values(), least, most)


def _places(symbolic: Sequence[tuple[Any, ...]], symbol: Any) -> list[Place]:
    return [
        Place(number, dim)
        for number, shape in enumerate(symbolic)
        for dim, size in enumerate(shape)
        if isinstance(size, torch.SymInt) and size.node.expr == symbol
    ]


def _mend(inputs: _Inputs, symbol: Any, broken: set[int]) -> str:
    """Returns the argument ``dynamic`` that keeps a size between the nearest ones that break a condition on it."""
    example, places = inputs.sizes[symbol], inputs.places[symbol]
    above = min((size for size in broken if size > example), default=None)
    below = max((size for size in broken if size < example), default=None)
    is_one_size = above is not None and below is not None and above - below <= 2
    if not places or is_one_size:
        return ""
    least, most = below + 1 if below is not None else None, above - 1 if above is not None else None
    return _dynamic(inputs, places[:1], least, most)


def _dynamic(inputs: _Inputs, places: Iterable[Place], least: int | None, most: int | None) -> str:
    """Returns the argument ``dynamic`` with a ``Dim`` at some places; empty if inputs are inside of arguments."""
    if any("." in one.name for one in inputs.own):
        return ""
    limits = [f", {name}={limit}" for name, limit in (("min", least), ("max", most)) if limit is not None]
    named = f'torch.export.Dim("size"{"".join(limits)})'
    entries = []
    for number, one in enumerate(inputs.own):
        dims = dict.fromkeys(one.dynamic, "torch.export.Dim.AUTO")
        dims |= {place.dim: named for place in places if place.input == number}
        spec = ", ".join(f"{dim}: {text}" for dim, text in dims.items())
        entries.append(f'"{one.name}": {{{spec}}}' if dims else f'"{one.name}": None')
    return f"{{{', '.join(entries)}}}"


def _limited(program: Program, symbol: Any, size: int) -> int:
    """Returns the size nearest to `size` that a program allows."""
    limits = program.exported.range_constraints.get(symbol)
    if limits is None:
        return size
    # PyTorch specialises on 0 and 1, but a program with the lower limit 2 can still run with size 1
    least = 1 if limits.lower <= 2 else int(limits.lower)
    return max(least, min(size, int(limits.upper)) if limits.upper.is_Integer else size)


def _of_batches(symbolic: Iterable[tuple[Any, ...]]) -> set[Any]:
    return {symbol for shape in symbolic for symbol in _symbols_of(shape[:1])}


def _symbols_of(shape: tuple[Any, ...]) -> set[Any]:
    return {symbol for size in shape if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}


def _solved(symbolic: Sequence[tuple[Any, ...]], shapes: Sequence[Shape]) -> Iterator[tuple[Any, int]]:
    """Yields the value of each symbol for inputs of these shapes, if some size depends on no other symbol."""
    import sympy

    for shape, known in zip(symbolic, shapes, strict=True):
        for size, number in zip(shape, known, strict=True):
            symbols = _symbols_of((size,))
            if len(symbols) == 1:
                [symbol] = symbols
                # sympy assumes symbols to be positive, so it finds no solution for a size of 0
                solutions = [number] if size.node.expr == symbol else sympy.solve(size.node.expr - number, symbol)
                yield from ((symbol, int(solution)) for solution in solutions[:1])


def _shapes_with(values: Mapping[Any, int], symbolic: Any, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    return tuple(map(functools.partial(_evaluated, values), symbolic, shapes))


def _evaluated(values: Mapping[Any, int], symbolic: tuple[Any, ...], shape: Shape) -> Shape:
    """Returns a shape with these values of symbols; a size that depends on other symbols is the size in `shape`."""
    return tuple(
        int(size.node.expr.subs(values)) if (symbols := _symbols_of((size,))) and symbols <= values.keys() else number
        for size, number in zip(symbolic, shape, strict=True)
    )


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
