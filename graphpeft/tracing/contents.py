"""What can change and remain the same object: containers, arrays, generators of random numbers, context variables."""

from __future__ import annotations

import array
import copy
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

CONTAINERS = (dict, list, set, deque)
"""Kinds of containers whose content can change."""

PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, Tensor, nn.Parameter))
"""Types of values in which nothing can be found that a forward changes in Python code."""

_ABSENT = object()

_BYTES = (bytearray, array.array)

_NUMPYS_GENERATORS = ("RandomState", "Generator")


def parts_of(container: Any) -> Iterable[Any]:
    """Returns what is in a container, or in a tuple."""
    return dict.values(container) if isinstance(container, dict) else container


def changeable_parts(bindings: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yields what can change in the values of names, or in containers there: the name, and the object."""
    seen: set[int] = set()
    waiting = list(bindings)
    while waiting:
        name, value = waiting.pop()
        if type(value) in PLAIN or id(value) in seen:
            continue
        if isinstance(value, tuple):
            waiting += [(name, part) for part in value]
        elif isinstance(value, CONTAINERS):
            seen.add(id(value))
            yield name, value
            waiting += [(name, part) for part in parts_of(value)]
        elif has_content(value):
            seen.add(id(value))
            yield name, value


def has_content(value: Any) -> bool:
    """Tells whether `value`, no container, has a content that can change."""
    if isinstance(value, (random.Random, ContextVar, *_BYTES)):
        return True
    return _is_array(value) or _is_generator_of_numpy(value)


def content_of(value: Any) -> Any:
    """Returns a copy of the content of what can change."""
    if isinstance(value, dict):
        # what a dictionary holds, and not what a class of a user's makes of that when it is asked
        return value.copy() if type(value) is dict else dict(dict.items(value))
    if isinstance(value, (*CONTAINERS, *_BYTES)):
        return copy.copy(value)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, ContextVar):
        return value.get(None)
    if _is_generator_of_numpy(value):
        return _bits(value).state
    return value.copy()


def is_unchanged(value: Any, content: Any) -> bool:
    """Tells whether `value` has this content: a container the very same objects, in their order."""
    if isinstance(value, dict):
        return len(value) == len(content) and all(
            dict.get(value, key, _ABSENT) is held for key, held in content.items()
        )
    if isinstance(value, set):
        return value == content
    if isinstance(value, CONTAINERS):
        return len(value) == len(content) and all(now is was for now, was in zip(value, content, strict=True))
    if isinstance(value, ContextVar):
        return value.get(None) is content
    return as_comparable(value) == as_comparable(content)


def put_back(value: Any, content: Any) -> None:
    """Gives `value` its content again, touching only what differs: other threads may run the model meanwhile."""
    if isinstance(value, dict):
        for key in [key for key in value if key not in content]:
            del value[key]
        for key, held in content.items():
            if dict.get(value, key, _ABSENT) is not held:
                value[key] = held
    elif is_unchanged(value, content):
        return
    elif isinstance(value, set):
        value.clear()
        value.update(content)
    elif isinstance(value, list | deque):
        value.clear()
        value.extend(content)
    elif isinstance(value, random.Random):
        value.setstate(content)
    elif isinstance(value, ContextVar):
        value.set(content)
    elif _is_generator_of_numpy(value):
        _bits(value).state = content
    else:
        value[:] = content


def as_comparable(value: Any) -> Any:
    """Returns what is equal if the content of a value is, which is no container.

    Args:
        value: The value, or its content.
    """
    if isinstance(value, ContextVar):
        return value.get(None)
    if _is_array(value):
        return repr((value.shape, value.tobytes()))
    return repr(content_of(value) if has_content(value) else value)


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "tobytes") and hasattr(type(value), "__setitem__")


def _is_generator_of_numpy(value: Any) -> bool:
    cls = type(value)
    return cls.__module__.startswith("numpy.random") and cls.__name__ in _NUMPYS_GENERATORS


def _bits(generator: Any) -> Any:
    return getattr(generator, "bit_generator", None) or generator._bit_generator
