"""Watches Python's and NumPy's random generators. A forward must not draw from them: a graph would repeat the numbers.

PyTorch's random functions are nodes of the graph, so they draw in each run.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

from graphpeft.graph.errors import DrawsNumbersError


@contextlib.contextmanager
def no_random_python_numbers() -> Iterator[None]:
    """Raises DrawsNumbersError at the end if code inside the context draws from Python's or NumPy's generator."""
    before, failed = random_python_states(), None
    try:
        yield
    except Exception as error:
        failed = error
    except BaseException:
        _put_back(before, random_python_states())
        raise
    after = random_python_states()
    _put_back(before, after)
    if after != before:
        # another error may be a consequence of the drawn numbers
        message = "it draws random numbers with Python's random or NumPy, which a graph can't hold"
        raise DrawsNumbersError(message) from failed
    if failed is not None:
        raise failed


@contextlib.contextmanager
def random_python_states_kept() -> Iterator[None]:
    """Restores the states of Python's and NumPy's generators at the end."""
    before = random_python_states()
    try:
        yield
    finally:
        _put_back(before, random_python_states())


def random_python_states() -> tuple[Any, Any]:
    """Returns the states of Python's and NumPy's generators; None for NumPy's where it isn't imported."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate(), None
    name, keys, *rest = numpy.random.get_state()
    return random.getstate(), (name, keys.tobytes(), *rest)


def _put_back(states: tuple[Any, Any], now: tuple[Any, Any]) -> None:
    if now[0] != states[0]:
        random.setstate(states[0])
    if now[1] != states[1] and states[1] is not None:
        numpy = sys.modules["numpy"]
        name, keys, *rest = states[1]
        numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
