"""What can change and remain the same object: containers, NumPy's arrays, generators of random numbers."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

CONTAINERS = (dict, list, set, deque)
"""Kinds of containers whose content can change."""

PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, Tensor, nn.Parameter))
"""Types of values in which nothing can be found that a forward changes in Python code."""

_NUMPYS_GENERATORS = ("RandomState", "Generator")


def parts_of(container: Any) -> Iterable[Any]:
    """Returns what is in a container, or in a tuple."""
    return container.values() if isinstance(container, dict) else container


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
    return isinstance(value, random.Random) or _is_array(value) or _is_generator_of_numpy(value)


def content_of(value: Any) -> Any:
    """Returns a copy of the content of what can change."""
    if isinstance(value, CONTAINERS):
        return copy.copy(value)
    if isinstance(value, random.Random):
        return value.getstate()
    if _is_generator_of_numpy(value):
        return _bits(value).state
    return value.copy()


def is_unchanged(value: Any, content: Any) -> bool:
    """Tells whether `value` has this content: a container the very same objects, in their order."""
    if isinstance(value, dict):
        return len(value) == len(content) and all(key in value and value[key] is held for key, held in content.items())
    if isinstance(value, set):
        return value == content
    if isinstance(value, CONTAINERS):
        return len(value) == len(content) and all(now is was for now, was in zip(value, content, strict=True))
    return as_comparable(value) == as_comparable(content)


def put_back(value: Any, content: Any) -> None:
    """Gives `value` its content again, touching only what differs: other threads may run the model meanwhile."""
    if isinstance(value, dict):
        for key in [key for key in value if key not in content]:
            del value[key]
        for key, held in content.items():
            if key not in value or value[key] is not held:
                value[key] = held
    elif is_unchanged(value, content):
        return
    elif isinstance(value, CONTAINERS):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(content)
    elif isinstance(value, random.Random):
        value.setstate(content)
    elif _is_generator_of_numpy(value):
        _bits(value).state = content
    else:
        value[...] = content


def as_comparable(value: Any) -> str:
    """Returns a text of what is no container, or of its content, which is equal if the content is."""
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
