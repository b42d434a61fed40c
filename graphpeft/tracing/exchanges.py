"""What is exchanged for the time of a trace, and can be taken back meanwhile for code that isn't part of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import CellType
from typing import Any, NamedTuple
from unittest import mock


class _Exchange(NamedTuple):
    put: Callable[[], Any]
    take_back: Callable[[], Any]


class Exchanges:
    """Exchanges values, and puts them back at the end of a stack.

    Args:
        stack: The stack.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._made: list[_Exchange] = []
        self._are_taken_back = False
        stack.callback(self._take_back)

    def attribute(self, owner: Any, name: str, new: Any, create: bool = False) -> None:
        """Gives an attribute another value; `create` allows that it has none of its own."""
        patch = mock.patch.object(owner, name, new, create=create)
        self._put(patch.__enter__, lambda: patch.__exit__(None, None, None))

    def item(self, mapping: dict[str, Any], name: str, new: Any) -> None:
        """Gives a name of a dictionary, such as that of a Python module's names, another value."""
        old = mapping[name]
        self._put(lambda: mapping.__setitem__(name, new), lambda: mapping.__setitem__(name, old))

    def cell(self, cell: CellType, new: Any) -> None:
        """Gives a variable around a function another value."""
        old = cell.cell_contents
        self._put(lambda: setattr(cell, "cell_contents", new), lambda: setattr(cell, "cell_contents", old))

    @contextlib.contextmanager
    def taken_back(self) -> Iterator[None]:
        """Takes everything back for a while."""
        if self._are_taken_back:
            yield
            return
        self._take_back()
        try:
            yield
        finally:
            for exchange in self._made:
                exchange.put()
            self._are_taken_back = False

    def _put(self, put: Callable[[], Any], take_back: Callable[[], Any]) -> None:
        put()
        self._made.append(_Exchange(put, take_back))

    def _take_back(self) -> None:
        self._are_taken_back = True
        for exchange in reversed(self._made):
            exchange.take_back()
