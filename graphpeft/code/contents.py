"""Contents of mutable objects: containers, arrays, random generators and context variables, and what these hold.

A graph has constants of the plain values that code reads in them: it reads these again in each run, and compares.
"""

from __future__ import annotations

import array
import copy
import functools
import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from graphpeft.code.attribute_paths import ANY
from graphpeft.code.namespaces import attributes_of, slots_of

CONTAINERS = (dict, list, set, deque)
"""Mutable containers."""

PLAIN = frozenset((
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Tensor, nn.Parameter,
))  # fmt: skip
"""Types whose objects hold no Python state that a forward can change."""

SETTINGS = PLAIN - {Tensor, nn.Parameter}
"""Types of values that generated code can have."""

_ABSENT = object()


def parts_of(container: Any) -> Iterable[Any]:
    """Returns the items of a container or tuple, or the values of a dict, without calling a user's subclass."""
    base = _base_of(container)
    return dict.values(container) if issubclass(base, dict) else base.__iter__(container)


def _base_of(container: Any) -> Any:
    """Returns the built-in base class of a container, whose methods bypass overrides of a user's subclass."""
    return next(base for base in (OrderedDict, *CONTAINERS, tuple) if issubclass(type(container), base))


class _Content(NamedTuple):
    """Functions for the content of a mutable type that isn't a container.

    Attributes:
        copy: Returns a copy of an object's content.
        put_back: Restores an object's content from a copy.
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
    """Returns the functions for the content of a class, or None for containers and for objects without content."""
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
    """Returns whether `value` is a mutable object with content, other than a container."""
    return _content(type(value)) is not None


def changeable_parts(names: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yields the mutable objects among named values, and in containers there, each with its name."""
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
    """Returns a copy of a mutable object's content."""
    kind = type(value)
    if issubclass(kind, dict):
        return dict(dict.items(value))
    if issubclass(kind, set):
        return set(set.__iter__(value))
    content = _content(kind)
    return list(parts_of(value)) if content is None else content.copy(value)


def is_unchanged(value: Any, content: Any) -> bool:
    """Returns whether `value` still has `content`; a list or deque must hold the same objects in the same order."""
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
    """Restores the content of `value`, changing only items that differ, since other threads may run the model."""
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
    """Returns a key that is equal for equal contents of two objects, which aren't containers."""
    content = _content(type(value))
    if content is _VARIABLE:
        return value.get(None)
    if content is _ARRAY:
        return repr((value.shape, value.tobytes()))
    return repr(value if content is None else content.copy(value))


LONGEST = 256
"""A container with more values inside is not compared."""

_CLOSED = (nn.Module, Tensor, ModuleType)
"""Classes of objects that hold no settings."""

_NAMED = (type, FunctionType, BuiltinFunctionType)
"""Classes of what a program defines, which is told apart by its name."""

_LIBRARY = sys.stdlib_module_names - {"argparse", "collections", "functools", "types"}
"""Packages whose objects hold no settings, as a logger."""

_BY_SYNTAX = ("__bool__", "__call__", "__contains__", "__getattr__", "__getitem__", "__iter__")
"""Methods that code calls without their names."""

_NUMBERS_AND_TEXTS = frozenset((bool, int, float, str))


def is_compared_whole(value: Any) -> bool:
    """Returns whether an object is compared as a whole: a container, a function, or an object of a library's class."""
    kind = type(value)
    kinds = (*CONTAINERS, tuple, frozenset, range, slice, Enum, MappingProxyType, MethodType, functools.partial)
    is_of_library = kind.__module__.partition(".")[0] in (*_LIBRARY, "numpy")
    return issubclass(kind, (*kinds, *_NAMED, *_CLOSED)) or has_content(value) or is_of_library


def entries(value: Any, names: Collection[str]) -> Any:
    """Returns the plain values in a container or an object, also those in containers and objects there."""
    left = [LONGEST]
    found = _entries(value, names, (), left)
    return found if left[0] >= 0 else None


def name_of(value: Any) -> str:
    """Returns a text that tells classes and functions apart, and objects by their classes."""
    named = value if issubclass(type(value), _NAMED) else type(value)
    code = getattr(named, "__code__", None)
    line = f":{code.co_firstlineno}" if code is not None else ""
    return f"{named.__module__}.{named.__qualname__}{line}"


def _entries(value: Any, names: Collection[str], around: tuple[Any, ...], left: list[int]) -> Any:
    kind = type(value)
    if kind in SETTINGS:
        return value if value == value else "nan"
    if issubclass(kind, (*_CLOSED, *_NAMED)) or any(value is each for each in around):
        return name_of(value)
    around = (*around, value)
    if issubclass(kind, MethodType):
        return _each([value.__func__, value.__self__], names, around, left)
    if issubclass(kind, functools.partial):
        return _each([value.func, *value.args, value.keywords], names, around, left)
    if issubclass(kind, dict | MappingProxyType):
        table: dict[Any, Any] = value if issubclass(kind, dict) else dict(value)
        # code that names no key computes them
        keys = [key for key in dict.keys(table) if key in names] or list(dict.keys(table))
        held = _each([dict.get(table, key) for key in keys], names, around, left)
        return dict(zip([key if type(key) in SETTINGS else _shown(key) for key in keys], held, strict=True))
    if issubclass(kind, set | frozenset):
        members = set.__iter__(value) if issubclass(kind, set) else frozenset.__iter__(value)
        return sorted(map(repr, _each(list(members), names, around, left)))
    if issubclass(kind, (*CONTAINERS, tuple)):
        return _each(list(parts_of(value)), names, around, left)
    if issubclass(kind, Enum):
        return f"{name_of(value)}.{value._name_}"
    if issubclass(kind, range | slice):
        return repr(value)
    if _content(kind) in (_BYTES, _ARRAY):
        left[0] -= int(getattr(value, "size", None) or len(value))
        return comparable(value) if left[0] >= 0 else None
    if _content(kind) is _VARIABLE:
        return _entries(value.get(None), names, around, left)
    if kind.__module__ == "numpy":
        return repr(value)
    read = {} if kind.__module__.partition(".")[0] in _LIBRARY else attributes_read(value, names)
    held = _each(list(read.values()), names, around, left)
    return {"": name_of(value), **dict(zip(read, held, strict=True))}


def _each(values: list[Any], names: Collection[str], around: tuple[Any, ...], left: list[int]) -> list[Any]:
    """Returns the plain values in each of several values; None for each if these are too many to compare."""
    left[0] -= len(values)
    if left[0] < 0:
        return [None] * len(values)
    # most are numbers and texts
    if {*map(type, values)} <= _NUMBERS_AND_TEXTS and all(map(operator.eq, values, values)):
        return values
    return [_entries(each, names, around, left) for each in values]


def _shown(key: Any) -> str:
    """Returns a key of a dictionary as text, which is the same for its copy."""
    return name_of(key) if type(key).__repr__ is object.__repr__ else repr(key)


def attributes_read(value: Any, names: Collection[str]) -> Mapping[str, Any]:
    """Returns the attributes of an object that code may read which names some attributes, or calls methods that do."""
    slots = slots_of(type(value))
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)} | (attributes_of(value) or {})
    if ANY in names:
        return held
    return {name: held[name] for name in sorted(held.keys() & _reached(type(value), tuple(names)))}


@functools.lru_cache(maxsize=256)
def _reached(cls: type, names: tuple[str, ...]) -> frozenset[str]:
    """Returns names with those in the methods and properties of a class that are called by them."""
    waiting, found = [*names, *_BY_SYNTAX], {*names, *_BY_SYNTAX}
    while waiting:
        name = waiting.pop()
        for member in (vars(base).get(name) for base in cls.__mro__):
            behind = getattr(member, "fget", None) or getattr(member, "func", None) or member
            code = getattr(getattr(behind, "__func__", behind), "__code__", None)
            new = {*code.co_names} - found if code is not None else ()
            waiting += new
            found.update(new)
    return frozenset(found)
