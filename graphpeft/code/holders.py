"""What binds names to values that a forward can change: objects, classes, functions, Python modules, closures."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any, NamedTuple, Protocol

from torch import nn


class Holder(Protocol):
    """Something that binds names."""

    @property
    def key(self) -> Hashable:
        """What tells it from all others."""
        ...

    def bindings(self) -> Mapping[str, Any]:
        """Returns the values that its names have now."""
        ...

    def bind(self, name: str, value: Any) -> None:
        """Gives a name a value."""
        ...

    def unbind(self, name: str) -> None:
        """Takes a name away."""
        ...

    def described(self, name: str, owner: nn.Module) -> str:
        """Returns what a name is to a module's code, for a person to read."""
        ...


class Attribute(NamedTuple):
    """A name of a holder, such as an attribute of a module.

    Attributes:
        holder: The holder.
        name: The name.
    """

    holder: Holder
    name: str

    def __hash__(self) -> int:
        return hash((self.holder.key, self.name))

    def __eq__(self, other: object) -> bool:
        # what is held may compare as it likes
        return isinstance(other, Attribute) and self.holder.key == other.holder.key and self.name == other.name


@dataclass(frozen=True, eq=False)
class OfObject:
    """The attributes of a module, or of an object of a user's class."""

    of: Any

    @property
    def key(self) -> Hashable:
        """The identity of the object."""
        return id(self.of)

    def bindings(self) -> dict[str, Any]:
        """Returns the object's attributes."""
        attributes = attributes_of(self.of)
        return {} if attributes is None else attributes

    def bind(self, name: str, value: Any) -> None:
        """Sets an attribute, without the code that the object may have for this."""
        self.bindings()[name] = value

    def unbind(self, name: str) -> None:
        """Takes an attribute away."""
        del self.bindings()[name]

    def described(self, name: str, owner: nn.Module) -> str:
        """Names it as the module's own code does."""
        return f"self.{name}" if self.of is owner else f"its {type(self.of).__name__}.{name}"


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


@dataclass(frozen=True, eq=False)
class OfSlots:
    """The attributes of an object of a user's class for which the class has slots."""

    of: Any

    @property
    def key(self) -> Hashable:
        """The identity of the object, as one with slots."""
        return id(self.of), "slots"

    def bindings(self) -> Mapping[str, Any]:
        """Returns the attributes that have a value."""
        found = {}
        for name, slot in slots_of(type(self.of)).items():
            with contextlib.suppress(AttributeError):
                found[name] = slot.__get__(self.of)
        return found

    def bind(self, name: str, value: Any) -> None:
        """Sets an attribute, without the code that the object may have for this."""
        slots_of(type(self.of))[name].__set__(self.of, value)

    def unbind(self, name: str) -> None:
        """Takes an attribute away."""
        slots_of(type(self.of))[name].__delete__(self.of)

    def described(self, name: str, owner: nn.Module) -> str:
        """Names it as the module's own code does."""
        return f"its {type(self.of).__name__}.{name}"


@functools.cache
def slots_of(cls: type) -> Mapping[str, MemberDescriptorType]:
    """Returns the slots of a class written in Python, which a class that inherits from it may hide by properties."""
    # classes written in C have such members, too, which can't be set
    bases = [base for base in reversed(cls.__mro__) if "__slots__" in vars(base)]
    members = [item for base in bases for item in vars(base).items()]
    return {name: slot for name, slot in members if isinstance(slot, MemberDescriptorType)}


@dataclass(frozen=True, eq=False)
class OfClass:
    """The attributes of a class of a user's."""

    of: type

    @property
    def key(self) -> Hashable:
        """The identity of the class."""
        return id(self.of)

    def bindings(self) -> Mapping[str, Any]:
        """Returns what the class itself defines."""
        defined = vars(self.of)
        if _OF_COPIES not in defined:
            return defined
        return {name: value for name, value in defined.items() if name != _OF_COPIES}

    def bind(self, name: str, value: Any) -> None:
        """Sets an attribute, without the code that the metaclass may have for this."""
        type.__setattr__(self.of, name, value)

    def unbind(self, name: str) -> None:
        """Takes an attribute away."""
        type.__delattr__(self.of, name)

    def described(self, name: str, owner: nn.Module) -> str:
        """Names the class, too."""
        return f"the class attribute {self.of.__name__}.{name}"


_OF_COPIES = "__slotnames__"
"""Where Python notes something of a class when one of its objects is copied for the first time."""


@dataclass(frozen=True, eq=False)
class OfFunction:
    """The attributes of a function of a user's, and its defaults."""

    of: FunctionType

    @property
    def key(self) -> Hashable:
        """The identity of the function."""
        return id(self.of)

    def bindings(self) -> Mapping[str, Any]:
        """Returns the attributes, with the defaults under the names that they have as such."""
        return {name: getattr(self.of, name) for name in _DEFAULTS} | self.of.__dict__

    def bind(self, name: str, value: Any) -> None:
        """Sets an attribute."""
        setattr(self.of, name, value)

    def unbind(self, name: str) -> None:
        """Takes an attribute away."""
        delattr(self.of, name)

    def described(self, name: str, owner: nn.Module) -> str:
        """Names the function, too."""
        what = "the defaults" if name in _DEFAULTS else f"the attribute {name}"
        return f"{what} of the function {self.of.__qualname__}"


_DEFAULTS = ("__defaults__", "__kwdefaults__")


@dataclass(frozen=True, eq=False)
class Global:
    """One name of a Python module."""

    namespace: dict[str, Any]
    name: str

    @property
    def key(self) -> Hashable:
        """The identity of the Python module's names, and the name."""
        return id(self.namespace), self.name

    def bindings(self) -> Mapping[str, Any]:
        """Returns the name alone, if it is there."""
        return {self.name: self.namespace[self.name]} if self.name in self.namespace else {}

    def bind(self, name: str, value: Any) -> None:
        """Gives the name a value."""
        self.namespace[name] = value

    def unbind(self, name: str) -> None:
        """Takes the name away."""
        del self.namespace[name]

    def described(self, name: str, owner: nn.Module) -> str:
        """Names the Python module, too."""
        return f"the global {name} of the Python module {self.namespace.get('__name__')}"


@dataclass(frozen=True, eq=False)
class Cell:
    """A variable of a function that is shared with a function inside it."""

    cell: CellType
    name: str
    function: FunctionType

    @property
    def key(self) -> Hashable:
        """The identity of the cell."""
        return id(self.cell)

    def bindings(self) -> Mapping[str, Any]:
        """Returns the variable alone, if it has a value."""
        try:
            return {self.name: self.cell.cell_contents}
        except ValueError:
            return {}

    def bind(self, name: str, value: Any) -> None:
        """Gives the variable a value."""
        self.cell.cell_contents = value

    def unbind(self, name: str) -> None:
        """Takes its value away."""
        del self.cell.cell_contents

    def described(self, name: str, owner: nn.Module) -> str:
        """Names the function inside."""
        return f"the variable {name} around {self.function.__qualname__}"
