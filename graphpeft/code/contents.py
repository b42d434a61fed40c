"""What can change and remain the same object: containers, arrays, generators of random numbers, context variables."""

from __future__ import annotations

import array
import copy
import operator
import random
from collections import OrderedDict, deque
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
    """Returns what is in a container, or in a tuple: not what a class of a user's makes of that when it is asked."""
    base = _base_of(container)
    return dict.values(container) if issubclass(base, dict) else base.__iter__(container)


def _base_of(container: Any) -> Any:
    """Returns the kind of container that one is, whose methods change or tell what is in it and nothing else."""
    return next(base for base in (OrderedDict, *CONTAINERS, tuple) if issubclass(type(container), base))


def changeable_parts(bindings: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yields what can change in the values of names, or in containers there: the name, and the object."""
    seen: set[int] = set()
    waiting = list(bindings)
    while waiting:
        name, value = waiting.pop()
        if type(value) in PLAIN or id(value) in seen:
            continue
        if issubclass(type(value), tuple):
            waiting += [(name, part) for part in parts_of(value)]
        elif issubclass(type(value), CONTAINERS):
            seen.add(id(value))
            yield name, value
            waiting += [(name, part) for part in parts_of(value)]
        elif has_content(value):
            seen.add(id(value))
            yield name, value


def has_content(value: Any) -> bool:
    """Tells whether `value`, no container, has a content that can change."""
    if issubclass(type(value), (random.Random, ContextVar, *_BYTES)):
        return True
    return _is_array(value) or _is_generator_of_numpy(value)


def content_of(value: Any) -> Any:
    """Returns a copy of the content of what can change."""
    kind = type(value)
    if issubclass(kind, dict):
        return dict(dict.items(value))
    if issubclass(kind, CONTAINERS):
        return set(set.__iter__(value)) if issubclass(kind, set) else list(parts_of(value))
    if issubclass(kind, _BYTES):
        return copy.copy(value)
    if issubclass(kind, random.Random):
        return value.getstate()
    if issubclass(kind, ContextVar):
        return value.get(None)
    if _is_generator_of_numpy(value):
        return _bits(value).state
    return value.copy()


def is_unchanged(value: Any, content: Any) -> bool:
    """Tells whether `value` has this content: a container the very same objects, in their order."""
    kind = type(value)
    if issubclass(kind, dict):
        return dict.__len__(value) == len(content) and all(
            dict.get(value, key, _ABSENT) is held for key, held in content.items()
        )
    if issubclass(kind, set):
        return set.__eq__(value, content)
    if issubclass(kind, CONTAINERS):
        now = list(parts_of(value))
        return len(now) == len(content) and all(map(operator.is_, now, content))
    if issubclass(kind, ContextVar):
        return value.get(None) is content
    return as_comparable(value) == as_comparable(content)


def put_back(value: Any, content: Any) -> None:
    """Gives `value` its content again, touching only what differs: other threads may run the model meanwhile."""
    kind = type(value)
    if issubclass(kind, dict):
        base = _base_of(value)
        for key in [key for key in dict.keys(value) if key not in content]:
            base.__delitem__(value, key)
        for key, held in content.items():
            if dict.get(value, key, _ABSENT) is not held:
                base.__setitem__(value, key, held)
    elif is_unchanged(value, content):
        return
    elif issubclass(kind, set):
        set.clear(value)
        set.update(value, content)
    elif issubclass(kind, list | deque):
        base = _base_of(value)
        base.clear(value)
        base.extend(value, content)
    elif issubclass(kind, random.Random):
        value.setstate(content)
    elif issubclass(kind, ContextVar):
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
    if issubclass(type(value), ContextVar):
        return value.get(None)
    if _is_array(value):
        return repr((value.shape, value.tobytes()))
    return repr(content_of(value) if has_content(value) else value)


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "tobytes") and hasattr(type(value), "__setitem__")


def _is_generator_of_numpy(value: Any) -> bool:
    cls = type(value)
    return cls.__name__ in _NUMPYS_GENERATORS and str(cls.__module__).startswith("numpy.random")


def _bits(generator: Any) -> Any:
    return getattr(generator, "bit_generator", None) or generator._bit_generator
