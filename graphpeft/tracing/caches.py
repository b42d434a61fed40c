"""Functions with a cache that a model's code calls, which compute anew while it is traced.

What such a cache holds of a trace would be given to later calls, and what it holds of earlier ones would be frozen.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from typing import Any

import torch.fx as fx

_CACHED = functools._lru_cache_wrapper


def uncached(value: Any) -> Any:
    """Returns the function that a value is with a cache, or the value itself."""
    return value.__wrapped__ if type(value) is _CACHED else value


def forget_traced_values() -> None:
    """Clears the caches that hold values of a trace after all, such as those of libraries' classes."""
    for value in gc.get_objects():
        if type(value) is _CACHED and any(map(_is_traced, _content_of(value))):
            value.cache_clear()


def _content_of(cached: Any) -> Iterator[Any]:
    """Yields the arguments and the results that a cache holds."""
    for part in gc.get_referents(cached):
        # a bounded cache refers to both by itself
        yield from (*dict.keys(part), *dict.values(part)) if type(part) is dict else (part,)


def _is_traced(value: Any, depth: int = 4) -> bool:
    # by its type, since a value of a model's may answer anything
    if issubclass(type(value), fx.Proxy):
        return True
    if depth == 0 or type(value) not in (tuple, list, dict, set, frozenset):
        return False
    return any(_is_traced(part, depth - 1) for part in ((*value, *value.values()) if type(value) is dict else value))
