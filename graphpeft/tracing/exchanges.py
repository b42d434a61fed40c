"""Temporary patches for a trace, which can be undone for a while to run code outside the trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import CellType
from typing import Any, NamedTuple

from graphpeft.transaction import at_end_of


class _Exchange(NamedTuple):
    put: Callable[[], Any]
    take_back: Callable[[], Any]


class Exchanges:
    """Replaces values, and restores them when an exit stack closes."""

    def __init__(self, stack: ExitStack) -> None:
        self._made: list[_Exchange] = []
        self._are_taken_back = False
        at_end_of(stack, self._take_back)

    def attribute(self, owner: Any, name: str, new: Any, create: bool = False) -> None:
        """Replaces an attribute; `create` allows an attribute that `owner` doesn't have."""
        if not create:
            getattr(owner, name)  # raises AttributeError rather than create an attribute
        old = vars(owner).get(name, _ABSENT)
        self._put(lambda: setattr(owner, name, new), lambda: _set_again(owner, name, old))

    def item(self, mapping: dict[str, Any], name: str, new: Any) -> None:
        """Replaces an item of a dictionary, such as a global of a Python module."""
        old = mapping[name]
        self._put(lambda: mapping.__setitem__(name, new), lambda: mapping.__setitem__(name, old))

    def cell(self, cell: CellType, new: Any) -> None:
        """Replaces the value of a closure variable."""
        old = cell.cell_contents
        self._put(lambda: setattr(cell, "cell_contents", new), lambda: setattr(cell, "cell_contents", old))

    @contextlib.contextmanager
    def taken_back(self) -> Iterator[None]:
        """Undoes all replacements inside the context."""
        if self._are_taken_back:
            yield
            return
        try:
            self._take_back()
            yield
        finally:
            for exchange in self._made:
                exchange.put()
            self._are_taken_back = False

    def _put(self, put: Callable[[], Any], take_back: Callable[[], Any]) -> None:
        # noted first, in case of an interrupt: undoing a replacement that wasn't made is harmless
        self._made.append(_Exchange(put, take_back))
        put()

    def _take_back(self) -> None:
        self._are_taken_back = True
        for exchange in reversed(self._made):
            exchange.take_back()


_ABSENT = object()


def _set_again(owner: Any, name: str, old: Any) -> None:
    if old is not _ABSENT:
        setattr(owner, name, old)
    elif name in vars(owner):
        delattr(owner, name)
