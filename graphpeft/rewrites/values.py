"""The values that operations have: nodes, what modules hold, products that no node computes, and constants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import fx

from graphpeft._torch import pytree
from graphpeft.graph.settings import is_number
from graphpeft.graph.template import SIMPLE, VALUE


@dataclass(frozen=True)
class Attribute:
    """A tensor, a number or a flag that the graph's module holds.

    Attributes:
        path: Its path in the module.
    """

    path: str

    def __repr__(self) -> str:
        return self.path


@dataclass(frozen=True, eq=False)
class Form:
    """An operation in the one form of its spellings.

    Attributes:
        function: The name of the function of PyTorch; of any other function, the function itself.
        arguments: The arguments by name; those of a function that isn't PyTorch's, by place.
        defaults: The values of arguments that may be left out, by name.
        assumes: The attributes, by path, whose present values have decided on this form.
        inside: Other nodes whose computation the form includes.
        lengths: The numbers of values of the arguments for which one number may stand, by name.
    """

    function: Any
    arguments: Mapping[Any, Any]
    defaults: Mapping[Any, Any]
    assumes: Mapping[str, Any]
    inside: tuple[fx.Node, ...] = ()
    lengths: Mapping[Any, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's name, for people."""
        return self.function if isinstance(self.function, str) else getattr(self.function, "__name__", "a call")

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.arguments.values()))})"

    def given(self, name: Any) -> Any:
        """Returns an argument, or its default; `MISSING` for a name that the operation doesn't have."""
        return self.arguments.get(name, self.defaults.get(name, MISSING))


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()
"""The value of an argument that an operation doesn't have."""

PLAIN = (*SIMPLE, torch.Size)
"""Types of values that are no tensors, and hold none."""

CLOSE = 1e-9
"""The relative difference up to which two numbers are taken for one, such as 0.7978845608 and sqrt(2 / pi)."""


def value_of(argument: Any) -> Any:
    """Returns an argument of a node as a value: an attribute in place of a node that reads one."""
    if isinstance(argument, fx.Node):
        return Attribute(str(argument.target)) if argument.op == "get_attr" else argument
    # a graph of fx has its own class of lists
    if isinstance(argument, list) or type(argument) is tuple:
        return tuple(value_of(part) for part in argument)
    if isinstance(argument, slice):
        return slice(*(value_of(part) for part in (argument.start, argument.stop, argument.step)))
    return argument


def is_tensor(value: Any, read: Any) -> bool:
    """Returns whether a value is, or holds, a tensor, or may be one."""
    leaves = pytree.tree_leaves(value)
    return any(_is_tensor(leaf, read) for leaf in leaves)


def _is_tensor(value: Any, read: Any) -> bool:
    if isinstance(value, Attribute):
        return isinstance(read(value.path), torch.Tensor)
    if isinstance(value, fx.Node):
        return not is_number(value) and not isinstance(value.meta.get(VALUE, value), PLAIN)
    return isinstance(value, Form)


def is_constant(value: Any) -> bool:
    """Returns whether nothing in a value is a node or an attribute."""
    return not any(isinstance(leaf, fx.Node | Form | Attribute) for leaf in pytree.tree_leaves(value))


def same(one: Any, other: Any) -> bool:
    """Returns whether two values are one: the same node or attribute, or equal constants."""
    if isinstance(one, fx.Node | Attribute) or isinstance(other, fx.Node | Attribute):
        return one is other or (isinstance(one, Attribute) and one == other)
    if isinstance(one, Form) and isinstance(other, Form):
        return one.function == other.function and all(
            same(one.given(name), other.given(name)) for name in {*one.arguments, *other.arguments}
        )
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return _same_parts(one, other)
    if isinstance(one, slice) and isinstance(other, slice):
        return _same_parts((one.start, one.stop, one.step), (other.start, other.stop, other.step))
    if _is_plain_number(one) and _is_plain_number(other):
        return one == other or math.isclose(one, other, rel_tol=CLOSE)
    return type(one) is type(other) and bool(one == other)


def _same_parts(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def spread(value: Any, length: int | None) -> Any:
    """Returns the values for which a number stands where a function takes `length` of them, as for ``stride=2``."""
    return (value,) * length if length is not None and _is_plain_number(value) else value


def _is_plain_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def example_of(value: Any, read: Any) -> Any:
    """Returns an example of a value: what a module holds, a constant, a tensor of the trace; None if unknown.

    A number that a graph computes may be another one in each run, so it isn't known.
    """
    if isinstance(value, Attribute):
        return read(value.path)
    if isinstance(value, fx.Node):
        example = value.meta.get(VALUE)
        return None if isinstance(example, PLAIN) else example
    if isinstance(value, tuple):
        return tuple(example_of(part, read) for part in value)
    return None if isinstance(value, Form) else value


def rank_of(value: Any, read: Any) -> int | None:
    """Returns the number of a tensor's dimensions; None if it isn't known."""
    example = example_of(value, read)
    return example.ndim if isinstance(example, torch.Tensor) else None


def shown(value: Any) -> str:
    """Returns a value as reports name it."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))})"
    return repr(value)
