"""Keeps the templates that were used last, so that a change of adapters that comes back is cheap."""

from __future__ import annotations

import threading
from typing import Protocol

from torch import fx


class HasGraphs(Protocol):
    """A template, as far as its size goes."""

    graphs: tuple[fx.Graph, ...]


_MOST_NODES = 20_000
"""The most nodes, in all graphs together, of the templates that are kept."""


class _LastUsed:
    """Keeps the most recently used derived templates alive, for the next change of adapters.

    Modules keep the templates that they wear, and these keep the templates from which they were derived.
    """

    def __init__(self) -> None:
        self._sizes: dict[HasGraphs, int] = {}
        self._total = 0
        self._lock = threading.Lock()

    def keep(self, template: HasGraphs) -> None:
        """Keeps a template, and forgets those that were used least lately if all together are too large."""
        with self._lock:
            size = self._sizes.pop(template, None)
            if size is None:
                size = sum(len(graph.nodes) for graph in template.graphs)
                self._total += size
            self._sizes[template] = size
            while self._total > _MOST_NODES and len(self._sizes) > 1:
                self._total -= self._sizes.pop(next(iter(self._sizes)))


LAST_USED = _LastUsed()
