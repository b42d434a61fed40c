"""Iterators that a forward can reach: a graph can't draw from them, and a trace must not.

An iterator doesn't tell how far it has come, and can't be set back. So for the time of a trace something stands in for
each, which raises if the forward draws from it, and draws from a copy where code runs on example values.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from graphpeft.code.contents import parts_of
from graphpeft.code.reach import Reach, is_iterator
from graphpeft.graph.errors import TraceError
from graphpeft.tracing.recorder import Recorder


class StandIn:
    """Stands in for an iterator.

    Args:
        tracer: The tracer.
        name: What it is to the code that draws from it.
        iterator: The iterator.
    """

    def __init__(self, tracer: Recorder, name: str, iterator: Any) -> None:
        self._tracer, self._name, self._iterator = tracer, name, iterator
        self._copy: Any = None

    def __iter__(self) -> Any:
        return iter(self._drawn_from())

    def __next__(self) -> Any:
        return next(self._drawn_from())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drawn_from(), name)

    def __deepcopy__(self, memo: Any) -> Any:
        return self._copied(memo)

    def _drawn_from(self) -> Any:
        if not self._tracer.is_of_this_thread:
            return self._iterator
        if self._tracer.is_recording:
            message = f"a forward draws from {self._name}, an iterator, which a graph can't hold"
            raise self._tracer.failing(TraceError(message))
        if self._copy is None:
            self._copy = self._copied({})
        return self._copy

    def _copied(self, memo: Any) -> Any:
        try:
            return copy.deepcopy(self._iterator, memo)
        except TypeError as error:
            kind = type(self._iterator).__name__
            raise TraceError(f"a forward draws from {self._name}, a {kind}, which can't be copied") from error


@contextlib.contextmanager
def iterators_stand_in(tracer: Recorder, reach: Reach) -> Iterator[None]:
    """Puts a stand-in in the place of each iterator that can be reached, and the iterator back at the end."""
    with contextlib.ExitStack() as stack:
        for namespace in reach.namespaces:
            for name, value in list(namespace.values().items()):
                stand_in_for = functools.partial(StandIn, tracer, namespace.describe(name, reach.owners(namespace)[0]))
                exchanged = _exchanged(value, stand_in_for, stack, set())
                if exchanged is not value:
                    namespace.bind(name, exchanged)
                    stack.callback(namespace.bind, name, value)
        yield


def _exchanged(value: Any, stand_in_for: Callable[[Any], StandIn], stack: contextlib.ExitStack, seen: set[int]) -> Any:
    """Returns a stand-in for an iterator, and containers with stand-ins for those in them."""
    if is_iterator(value):
        return stand_in_for(value)
    if not issubclass(type(value), dict | list | tuple) or id(value) in seen:
        return value
    seen.add(id(value))
    items = list(dict.items(value) if isinstance(value, dict) else enumerate(parts_of(value)))
    changes = {key: new for key, part in items if (new := _exchanged(part, stand_in_for, stack, seen)) is not part}
    if isinstance(value, tuple):
        return tuple(changes.get(index, part) for index, part in items) if changes else value
    for key, new in changes.items():
        stack.callback(value.__setitem__, key, value[key])
        value[key] = new
    return value
