"""The sizes of inputs at which an exported file is checked: sizes that its program accepts, and sizes that it refuses.

PyTorch's exporter follows one way through a model. Where the way depends on sizes, the program has a condition, such as
``x.shape[1] <= 500``, and refuses sizes that break it. Files for other runtimes don't contain the conditions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from graphpeft.exporting.example import Shape
from graphpeft.exporting.program import Program

_MORE: tuple[Callable[[int], int], ...] = (lambda size: size + 1, lambda size: 2 * size, lambda size: size - 1)
"""Sizes to try besides the example's; a model may need an even size, or allow no larger size."""

_FAR, _LARGE = 8, 2_048
"""Sizes up to this multiple of the example's, or up to this number, are tried; larger inputs may exhaust memory.

Above the multiple, batches have two rows at most.
"""

_NEAR = 8
"""Sizes at most this far from the example's, or as far as a number in a condition, are looked at one by one."""

_HIGHEST_DEGREE = 4
"""The highest degree of polynomials in one size whose roots are computed."""

_DOUBLINGS = 24
"""How often a size is doubled, or halved, to find one that breaks a condition."""


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
        are_given: Whether the caller has given the dynamic sizes, so that a program's limits may be the caller's. What
            follows from these is no condition of the program.
    """
    own = [one.shape for one in program.inputs[: len(shapes)]]
    sizes = dict(_solved(own, shapes))
    places = {symbol: each for symbol in sizes if (each := _places(own, symbol))}
    found: list[Break] = []
    too_large: dict[tuple[Any, int], str] = {}
    conditions = _conditions(program, sizes, are_given)
    broken = {
        (condition, symbol): sizes_that_break
        for condition in conditions
        for symbol in sorted(condition.free_symbols, key=str)
        if (sizes_that_break := _broken(condition, symbol, sizes))
    }
    for (condition, symbol), wrong in broken.items():
        text = _text(condition, {symbol: _name(program, each[0]) for symbol, each in places.items()})
        size = min(wrong, key=lambda one: abs(one - sizes[symbol]))
        is_far = size > _FAR * sizes[symbol]
        if is_far and size > _LARGE:
            too_large.setdefault((symbol, size), text)
            continue
        others = _of_batches(own) & sizes.keys() - condition.free_symbols if is_far else ()
        small = {one: min(sizes[one], 2) for one in others}
        tried = _shapes_with({**sizes, **small, symbol: size}, own, shapes)
        # a limit must exclude what breaks any condition on this size alone
        alone = [each for (other, own_symbol), each in broken.items() if other.free_symbols == {own_symbol} == {symbol}]
        # PyTorch doesn't infer from limits that a remainder is another one
        is_alone = condition.free_symbols == {symbol} and not _has_remainder(condition)
        mend = (
            _mend(program, len(shapes), places.get(symbol, ()), set().union(*alone), sizes[symbol]) if is_alone else ""
        )
        found.append(Break(tried, text, mend, conditions[condition]))
    found += _apart(program, shapes, places)
    if not are_given:
        found += _beyond_fixed(program, shapes)
        # PyTorch takes a size that is open for more than 1, which is no condition that it tells
        found += [Break(_shapes_with({**sizes, symbol: 1}, own, shapes)) for symbol in sizes]
    by_shapes = {one.shapes: one for one in reversed(found) if one.shapes != tuple(shapes)}
    return list(reversed(by_shapes.values())), list(too_large.values())


def _conditions(program: Program, sizes: Mapping[Any, int], are_given: bool) -> dict[Any, bool]:
    """Returns the conditions of a program that name some of these sizes, and no others, as sympy's expressions.

    Each has whether the model's own code decides by it.
    """
    import sympy  # here, since importing it takes longer than importing this library

    found: dict[Any, bool] = {}
    values = (node.meta.get("val") for node in program.exported.graph.nodes)
    environments = (value.fake_mode.shape_env for value in values if hasattr(value, "fake_mode"))
    for guard in getattr(next(environments, None), "guards", ()):
        found[guard.expr] = found.get(guard.expr, False) or _is_of_model(guard.sloc.framework_loc)
    for symbol in () if are_given else sizes:
        limits = program.exported.range_constraints.get(symbol)
        if limits is not None and limits.upper.is_Integer:
            found.setdefault(sympy.Le(symbol, limits.upper), True)
        if limits is not None and limits.lower > 2:
            found.setdefault(sympy.Ge(symbol, limits.lower), True)
    return {one: is_own for one, is_own in found.items() if one.free_symbols and one.free_symbols <= sizes.keys()}


def _is_of_model(frame: Any) -> bool:
    return not getattr(frame, "filename", "").startswith(os.path.join(os.path.dirname(torch.__file__), ""))


def _broken(condition: Any, symbol: Any, sizes: Mapping[Any, int]) -> set[int]:
    """Returns some sizes at which a condition doesn't hold, the nearest one to the example's among them."""
    import sympy

    alone = condition.subs({other: size for other, size in sizes.items() if other != symbol})
    size = sizes[symbol]

    def breaks_it(one: int) -> bool:
        try:
            return alone.subs(symbol, one) == sympy.false
        except ZeroDivisionError:  # a divisor in the condition is 0 at this size
            return False

    divisors = (abs(int(number)) for number in condition.atoms(sympy.Integer))
    reach = max([_NEAR, *(one for one in divisors if one <= _LARGE)])
    near = range(max(1, size - reach), size + reach + 1)
    far = (one for k in range(_DOUBLINGS) for one in (size << k, max(1, size >> k)))
    wanted = {*near, *far, *sizes.values(), *_roots(alone, symbol)}
    broken = {one for one in wanted if one >= 1 and breaks_it(one)}
    if not broken or breaks_it(size):
        return set()
    inside, outside = size, min(broken, key=lambda one: abs(one - size))
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        inside, outside = (inside, middle) if breaks_it(middle) else (middle, outside)
    return {*broken, outside}


def _has_remainder(condition: Any) -> bool:
    import sympy

    return any(type(function).__name__.endswith("Mod") for function in condition.atoms(sympy.Function))


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


def _beyond_fixed(program: Program, shapes: Sequence[Shape]) -> Iterator[Break]:
    """Yields shapes in which a size is larger by 1 than the one that the program fixes."""
    for number, (one, shape) in enumerate(zip(program.inputs[: len(shapes)], shapes, strict=True)):
        for dim, size in enumerate(one.shape):
            if not isinstance(size, torch.SymInt):
                condition = f"{_name(program, Place(number, dim))} == {size}"
                yield Break(_changed(shapes, Place(number, dim), shape[dim] + 1), condition)


def _apart(program: Program, shapes: Sequence[Shape], places: Mapping[Any, Sequence[Place]]) -> Iterator[Break]:
    """Yields shapes in which one of several sizes that a program takes for equal is another."""
    for found in places.values():
        for place in found[1:]:
            # 1 would be no decision, where operations broadcast it
            larger = _changed(shapes, place, shapes[place.input][place.dim] + 1)
            yield Break(larger, f"{_name(program, found[0])} == {_name(program, place)}", is_own=True)


def _changed(shapes: Sequence[Shape], place: Place, size: int) -> tuple[Shape, ...]:
    changed = [list(shape) for shape in shapes]
    changed[place.input][place.dim] = size
    return tuple(map(tuple, changed))


def _places(symbolic: Sequence[tuple[Any, ...]], symbol: Any) -> list[Place]:
    return [
        Place(number, dim)
        for number, shape in enumerate(symbolic)
        for dim, size in enumerate(shape)
        if isinstance(size, torch.SymInt) and size.node.expr == symbol
    ]


def _name(program: Program, place: Place) -> str:
    return f"{program.inputs[place.input].name}.shape[{place.dim}]"


def _text(condition: Any, names: Mapping[Any, str]) -> str:
    """Returns a condition in Python, with the inputs' dimensions in the place of symbols."""
    import sympy

    named = condition.subs({symbol: sympy.Symbol(name) for symbol, name in names.items()}, simultaneous=True)
    return f"{named.lhs} {named.rel_op} {named.rhs}" if hasattr(named, "rel_op") else str(named)


def _mend(program: Program, own: int, places: Sequence[Place], broken: set[int], example: int) -> str:
    """Returns the argument ``dynamic`` that excludes sizes, if these are all above or all below the example's."""
    inputs = program.inputs[:own]
    above = min((size for size in broken if size > example), default=None)
    below = max((size for size in broken if size < example), default=None)
    # between odd sizes, only one is left
    is_between = above is not None and below is not None and above - below <= 2
    if not places or is_between or any("." in one.name for one in inputs):
        return ""
    limits = [f"min={below + 1}"] if below is not None else []
    limits += [f"max={above - 1}"] if above is not None else []
    entries = []
    for number, one in enumerate(inputs):
        dims = dict.fromkeys(one.dynamic, "torch.export.Dim.AUTO")
        if number == places[0].input:
            dims[places[0].dim] = f'torch.export.Dim("size", {", ".join(limits)})'
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
