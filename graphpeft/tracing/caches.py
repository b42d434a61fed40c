"""Bypasses ``functools`` caches in a model's code while it is traced.

A cache would hand proxies of a trace to later calls, and would freeze results of earlier calls in the graph.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from typing import Any

import torch.fx as fx

_CACHED = functools._lru_cache_wrapper


def uncached(value: Any) -> Any:
    """Returns the function inside an ``lru_cache`` wrapper, or `value` itself if it isn't one."""
    return value.__wrapped__ if type(value) is _CACHED else value


def forget_traced_values() -> None:
    """Clears the caches that hold traced values all the same, such as caches of library classes."""
    for value in gc.get_objects():
        if type(value) is _CACHED and any(map(_is_traced, _content_of(value))):
            value.cache_clear()


def _content_of(cached: Any) -> Iterator[Any]:
    """Yields the arguments and results in a cache."""
    for part in gc.get_referents(cached):
        # a bounded cache refers to arguments and results directly, an unbounded one by a dict
        yield from (*dict.keys(part), *dict.values(part)) if type(part) is dict else (part,)


def _is_traced(value: Any, depth: int = 4) -> bool:
    # type(), since isinstance would read __class__, which user objects can override
    if issubclass(type(value), fx.Proxy):
        return True
    if depth == 0 or type(value) not in (tuple, list, dict, set, frozenset):
        return False
    return any(_is_traced(part, depth - 1) for part in ((*value, *value.values()) if type(value) is dict else value))
