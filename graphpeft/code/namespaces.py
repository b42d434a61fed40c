"""What binds names to values that a forward can change: objects, classes, functions, Python modules, closures."""

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
    """Something that binds names to values. It is read and changed without the code that an object may have for this.

    Attributes:
        of: The object, the class, the function, the dictionary of a Python module, or the cell of a closure.
        key: What tells it from all others.
        values: Returns the values that its names have now.
        bind: Gives a name a value.
        unbind: Takes a name away.
        describe: Returns what a name is to the code of a module, for a person to read.
    """

    of: Any
    key: Hashable
    values: Callable[[], Mapping[str, Any]]
    bind: Callable[[str, Any], Any]
    unbind: Callable[[str], Any]
    describe: Callable[[str, nn.Module], str]

    @classmethod
    def of_object(cls, owner: Any) -> Namespace:
        """Returns the attributes of a module, or of another object with a ``__dict__``."""

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
        """Returns the attributes of an object for which its class has slots."""
        slots = slots_of(type(owner))

        def values() -> dict[str, Any]:
            found = {}
            for name, slot in slots.items():
                with contextlib.suppress(AttributeError):  # it has no value
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
        """Returns the attributes that a class itself defines."""
        return cls(
            owner,
            id(owner),
            lambda: {name: value for name, value in vars(owner).items() if name != _OF_COPIES},
            functools.partial(type.__setattr__, owner),
            functools.partial(type.__delattr__, owner),
            lambda name, _: f"the class attribute {owner.__name__}.{name}",
        )

    @classmethod
    def of_function(cls, owner: FunctionType) -> Namespace:
        """Returns the attributes of a function, with its defaults."""

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
        """Returns one of the globals of a Python module."""
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
        """Returns the variable `name`, which a function shares with the one around it."""

        def values() -> dict[str, Any]:
            try:
                return {name: owner.cell_contents}
            except ValueError:  # it has no value
                return {}

        return cls(
            owner,
            id(owner),
            values,
            lambda _, value: setattr(owner, "cell_contents", value),
            lambda _: delattr(owner, "cell_contents"),
            lambda name, _: f"the variable {name} around {function.__qualname__}",
        )


_OF_COPIES = "__slotnames__"
"""Where Python notes something of a class when one of its objects is copied for the first time."""

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
        # what is held may compare as it likes
        return isinstance(other, Attribute) and (self.namespace.key, self.name) == (other.namespace.key, other.name)

    def described(self, module: nn.Module) -> str:
        """Returns what it is to the code of a module, for a person to read."""
        return self.namespace.describe(self.name, module)


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Returns the attributes of an object, without the code that it may have for this; None if it can't have any."""
    if issubclass(type(value), threading.local):
        # which has others in each thread, and no descriptor for them
        return threading.local.__getattribute__(value, "__dict__")
    descriptor = _descriptor_of_attributes(type(value))
    attributes = descriptor.__get__(value) if descriptor is not None else None
    return attributes if type(attributes) is dict else None


@functools.cache
def _descriptor_of_attributes(cls: type) -> GetSetDescriptorType | MemberDescriptorType | None:
    found = (vars(base).get("__dict__") for base in cls.__mro__)
    return next((each for each in found if isinstance(each, GetSetDescriptorType | MemberDescriptorType)), None)


@functools.cache
def slots_of(cls: type) -> Mapping[str, MemberDescriptorType]:
    """Returns the slots of a class written in Python, which a class that inherits from it may hide by properties."""
    # classes written in C have such members, too, which can't be set
    bases = [base for base in reversed(cls.__mro__) if "__slots__" in vars(base)]
    members = [item for base in bases for item in vars(base).items()]
    return {name: slot for name, slot in members if isinstance(slot, MemberDescriptorType)}
