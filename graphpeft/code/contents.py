"""What can change and remain the same object: containers, arrays, generators of random numbers, context variables."""

from __future__ import annotations

import array
import copy
import operator
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

CONTAINERS = (dict, list, set, deque)
"""Kinds of containers whose content can change."""

PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, Tensor, nn.Parameter))
"""Types of values in which nothing can be found that a forward changes in Python code."""

_ABSENT = object()


def parts_of(container: Any) -> Iterable[Any]:
    """Returns what is in a container, or in a tuple: not what a class of a user's makes of that when it is asked."""
    base = _base_of(container)
    return dict.values(container) if issubclass(base, dict) else base.__iter__(container)


def _base_of(container: Any) -> Any:
    """Returns the kind of container that one is, whose methods change or tell what is in it and nothing else."""
    return next(base for base in (OrderedDict, *CONTAINERS, tuple) if issubclass(type(container), base))


class _Content(NamedTuple):
    """The content of values of one kind, which are no containers.

    Attributes:
        copy: Returns a copy of a value's content.
        put_back: Gives a value that content again.
    """

    copy: Callable[[Any], Any]
    put_back: Callable[[Any, Any], Any]


_BYTES = _Content(copy.copy, lambda value, content: operator.setitem(value, slice(None), content))
_ARRAY = _Content(copy.copy, lambda value, content: operator.setitem(value, ..., content))
_RANDOM = _Content(random.Random.getstate, random.Random.setstate)
_VARIABLE = _Content(lambda value: value.get(None), ContextVar.set)
_OF_NUMPY = _Content(lambda value: _bits(value).state, lambda value, content: setattr(_bits(value), "state", content))


def _bits(generator: Any) -> Any:
    return getattr(generator, "bit_generator", None) or generator._bit_generator


def _content(cls: type) -> _Content | None:
    """Returns how to copy the content of values of a class, if they have one and are no containers."""
    if issubclass(cls, bytearray | array.array):
        return _BYTES
    if issubclass(cls, random.Random):
        return _RANDOM
    if issubclass(cls, ContextVar):
        return _VARIABLE
    if cls.__module__ == "numpy" and hasattr(cls, "tobytes") and hasattr(cls, "__setitem__"):
        return _ARRAY
    is_of_numpy = str(cls.__module__).startswith("numpy.random") and cls.__name__ in ("RandomState", "Generator")
    return _OF_NUMPY if is_of_numpy else None


def has_content(value: Any) -> bool:
    """Returns whether `value`, no container, has a content that can change."""
    return _content(type(value)) is not None


def changeable_parts(names: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yields what can change in the values of names, or in containers there: the name, and the object."""
    seen: set[int] = set()
    waiting = list(names)
    while waiting:
        name, value = waiting.pop()
        kind = type(value)
        if kind in PLAIN or id(value) in seen:
            continue
        if issubclass(kind, (*CONTAINERS, tuple)):
            waiting += [(name, part) for part in parts_of(value)]
        elif _content(kind) is None:
            continue
        if not issubclass(kind, tuple):
            seen.add(id(value))
            yield name, value


def content_of(value: Any) -> Any:
    """Returns a copy of the content of what can change."""
    kind = type(value)
    if issubclass(kind, dict):
        return dict(dict.items(value))
    if issubclass(kind, set):
        return set(set.__iter__(value))
    content = _content(kind)
    return list(parts_of(value)) if content is None else content.copy(value)


def is_unchanged(value: Any, content: Any) -> bool:
    """Returns whether `value` has this content: a container the very same objects, in their order."""
    kind = type(value)
    if issubclass(kind, dict):
        return dict.__len__(value) == len(content) and all(
            dict.get(value, key, _ABSENT) is held for key, held in content.items()
        )
    now = content_of(value)
    if issubclass(kind, set):
        return now == content
    if issubclass(kind, CONTAINERS):
        return len(now) == len(content) and all(map(operator.is_, now, content))
    return now is content or (not issubclass(kind, ContextVar) and comparable(now) == comparable(content))


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
    elif issubclass(kind, CONTAINERS):
        base = _base_of(value)
        base.clear(value)
        (base.update if base is set else base.extend)(value, content)
    else:
        cast(_Content, _content(kind)).put_back(value, content)


def comparable(value: Any) -> Any:
    """Returns what is equal if the contents of two values, which are no containers, are equal.

    Args:
        value: A value, or its content.
    """
    content = _content(type(value))
    if content is _VARIABLE:
        return value.get(None)
    if content is _ARRAY:
        return repr((value.shape, value.tobytes()))
    return repr(value if content is None else content.copy(value))
