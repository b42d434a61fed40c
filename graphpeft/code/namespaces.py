"""Namespaces, whose names a forward can rebind: objects, classes, functions, Python modules and closures."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any, NamedTuple, cast

from torch import nn


@dataclass(frozen=True, eq=False)
class Namespace:
    """An object that binds names to values. Reads and writes bypass code of the object, such as `__setattr__`.

    Attributes:
        of: The object, the class, the function, the dictionary of a Python module, or the cell of a closure.
        key: Identifies the namespace.
        values: Returns the present values by name.
        bind: Binds a name to a value.
        unbind: Deletes a name.
        describe: Describes a name for an error message, as the code of a module sees it.
    """

    of: Any
    key: Hashable
    values: Callable[[], Mapping[str, Any]]
    bind: Callable[[str, Any], Any]
    unbind: Callable[[str], Any]
    describe: Callable[[str, nn.Module], str]

    @classmethod
    def of_object(cls, owner: Any) -> Namespace:
        """Returns the namespace of a module, or of another object with a ``__dict__``."""

        def values() -> dict[str, Any]:
            return cast(dict[str, Any], attributes_of(owner))

        def describe(name: str, module: nn.Module) -> str:
            return f"self.{name}" if owner is module else f"its {type(owner).__name__}.{name}"

        return cls(
            owner,
            id(owner),
            values,
            lambda name, value: operator.setitem(values(), name, value),
            lambda name: operator.delitem(values(), name),
            describe,
        )

    @classmethod
    def of_slots(cls, owner: Any) -> Namespace:
        """Returns the namespace of an object's slots."""
        slots = slots_of(type(owner))

        def values() -> dict[str, Any]:
            found = {}
            for name, slot in slots.items():
                with contextlib.suppress(AttributeError):  # an empty slot
                    found[name] = slot.__get__(owner)
            return found

        return cls(
            owner,
            (id(owner), "slots"),
            values,
            lambda name, value: slots[name].__set__(owner, value),
            lambda name: slots[name].__delete__(owner),
            lambda name, _: f"its {type(owner).__name__}.{name}",
        )

    @classmethod
    def of_class(cls, owner: type) -> Namespace:
        """Returns the namespace of a class, without its bases."""
        return cls(
            owner,
            id(owner),
            lambda: {name: value for name, value in vars(owner).items() if name != _COPY_CACHE},
            functools.partial(type.__setattr__, owner),
            functools.partial(type.__delattr__, owner),
            lambda name, _: f"the class attribute {owner.__name__}.{name}",
        )

    @classmethod
    def of_function(cls, owner: FunctionType) -> Namespace:
        """Returns the namespace of a function: its attributes and its defaults."""

        def describe(name: str, _: nn.Module) -> str:
            what = "the defaults" if name in _DEFAULTS else f"the attribute {name}"
            return f"{what} of the function {owner.__qualname__}"

        return cls(
            owner,
            id(owner),
            lambda: {name: getattr(owner, name) for name in _DEFAULTS} | owner.__dict__,
            functools.partial(setattr, owner),
            functools.partial(delattr, owner),
            describe,
        )

    @classmethod
    def of_global(cls, owner: dict[str, Any], name: str) -> Namespace:
        """Returns the namespace of one global of a Python module."""
        return cls(
            owner,
            (id(owner), name),
            lambda: {name: owner[name]} if name in owner else {},
            owner.__setitem__,
            owner.__delitem__,
            lambda name, _: f"the global {name} of the Python module {owner.get('__name__')}",
        )

    @classmethod
    def of_cell(cls, owner: CellType, name: str, function: FunctionType) -> Namespace:
        """Returns the namespace of the closure variable `name` of a function."""

        def values() -> dict[str, Any]:
            try:
                return {name: owner.cell_contents}
            except ValueError:  # an empty cell
                return {}

        return cls(
            owner,
            id(owner),
            values,
            lambda _, value: setattr(owner, "cell_contents", value),
            lambda _: delattr(owner, "cell_contents"),
            lambda name, _: f"the variable {name} around {function.__qualname__}",
        )


_COPY_CACHE = "__slotnames__"
"""An attribute that Python sets on a class when one of its objects is first copied."""

_DEFAULTS = ("__defaults__", "__kwdefaults__")


class Attribute(NamedTuple):
    """A name in a namespace, such as an attribute of a module.

    Attributes:
        namespace: The namespace.
        name: The name.
    """

    namespace: Namespace
    name: str

    def __hash__(self) -> int:
        return hash((self.namespace.key, self.name))

    def __eq__(self, other: object) -> bool:
        # compares keys only, since values may define __eq__
        return isinstance(other, Attribute) and (self.namespace.key, self.name) == (other.namespace.key, other.name)

    def described(self, module: nn.Module) -> str:
        """Describes the attribute for an error message, as the code of a module sees it."""
        return self.namespace.describe(self.name, module)


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Returns the ``__dict__`` of an object, bypassing code of its class; None if it has no ``__dict__``."""
    if issubclass(type(value), threading.local):
        # has a __dict__ for each thread, and no descriptor for it
        return threading.local.__getattribute__(value, "__dict__")
    descriptor = _descriptor_of_attributes(type(value))
    attributes = descriptor.__get__(value) if descriptor is not None else None
    return attributes if type(attributes) is dict else None


@functools.lru_cache(maxsize=256)
def _descriptor_of_attributes(cls: type) -> GetSetDescriptorType | MemberDescriptorType | None:
    found = (vars(base).get("__dict__") for base in cls.__mro__)
    return next((each for each in found if isinstance(each, GetSetDescriptorType | MemberDescriptorType)), None)


@functools.lru_cache(maxsize=256)
def slots_of(cls: type) -> Mapping[str, MemberDescriptorType]:
    """Returns the slots of a class and its bases, even if properties of a subclass hide them."""
    # classes written in C have member descriptors without __slots__, which can't be set
    bases = [base for base in reversed(cls.__mro__) if "__slots__" in vars(base)]
    members = [item for base in bases for item in vars(base).items()]
    return {name: slot for name, slot in members if isinstance(slot, MemberDescriptorType)}
