"""The annotations of a config's options, with their types, bounds and roles.

The annotation of a field, such as ``r: Size`` or ``lora_dropout: InputDropout``, is its only declaration.
`check_options` compares the values with it, whether they come from code or from a file; `options_for` finds the options
of a role, whatever a method names them.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import itertools
import math
import sys
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from graphpeft.rules.plain_values import fields_of
from graphpeft.wording import shown


@dataclass(frozen=True)
class Within:
    """The bounds of a number, as an annotation; they exclude NaN.

    Attributes:
        words: The bounds in words, to follow "must be".
        least: The smallest number.
        most: The largest number.
    """

    words: str
    least: float
    most: float

    def problem(self, value: Any) -> str | None:
        """Returns what a number must be if it is out of bounds, else None."""
        if self.least <= value <= self.most:
            return None
        is_too_large = isinstance(value, int) and isinstance(self.most, int) and value > self.most
        return f"{self.most} at most" if is_too_large else self.words


_LARGEST = 3.4e38  # in single precision, in which adapters compute
_BELOW_1 = math.nextafter(1, 0)

Size = Annotated[int, Within("a positive integer", 1, 2**20)]
"""A number of dimensions, ranks or tokens. The bound is far above any model, and small enough to multiply."""

SizeOrZero = Annotated[int, Within("a whole number from 0 on", 0, 2**20)]
"""A number of dimensions or blocks, or 0 where it follows from something else."""

Layers = Annotated[int, Within("a positive integer", 1, 2**12)]
"""The number of a model's layers."""

Steps = Annotated[int, Within("a positive integer", 1, 100)]
"""A number of iterations; more than the bound changes no digit."""

Index = Annotated[int, Within("a whole number from 0 on", 0, 2**31 - 1)]
"""An index into a tensor."""

Kind = Annotated[int, Within("a number of 32 bits", -(2**31), 2**31 - 1)]
"""An integer for an int32 tensor."""

Seed = Annotated[int, Within("a whole number of 64 bits", -(2**63), 2**63 - 1)]
"""A seed of a generator of PyTorch's."""

Number = Annotated[float, Within("a finite number of single precision", -_LARGEST, _LARGEST)]
"""A factor."""

NotNegative = Annotated[float, Within("a finite number from 0 on", 0, _LARGEST)]
"""A length."""

Probability = Annotated[float, Within("a probability, 0 ≤ p ≤ 1", 0, 1)]
"""A probability, such as of dropout."""


class Role(enum.Enum):
    """The role of an option that the library asks for, whatever a method names it."""

    EDITABLE = "doesn't change the meaning of an adapter's tensors, so that a file's user may edit it"
    IDENTITY = "True makes first values that change nothing; editable"
    DROPOUT = "drops elements of a branch's input in training; editable"
    TURNED = "says in files that weights are stored as (in, out); editable"
    BIASES = "chooses the biases of the model to train"
    TYING = "says whether weights that are one stay one"
    PARAMETERS = "names weights as parameters"


_Value = TypeVar("_Value")

Editable = Annotated[_Value, Role.EDITABLE]
"""An option that doesn't change the meaning of an adapter's tensors, such as how they are drawn or trained."""

InitWeights = Annotated[bool, Role.IDENTITY]
"""Whether a fresh adapter changes nothing."""

InputDropout = Annotated[float, Within("a probability, 0 ≤ p ≤ 1", 0, 1), Role.DROPOUT]
"""The probability of dropping an element of a branch's input in training."""

InputDropoutBelow1 = Annotated[
    float, Within("a probability of dropping an element, 0 ≤ p < 1", 0, _BELOW_1), Role.DROPOUT
]
"""The same, below 1."""

Turned = Annotated[bool, Role.TURNED]
"""Whether weights are stored as (in, out), which files tell PEFT."""

TrainedBiases = Annotated[_Value, Role.BIASES]
"""The biases to train: ``"none"``, ``"all"``, or the adapted layers' biases by another value."""

Tying = Annotated[bool, Role.TYING]
"""Whether weights that are one stay one."""

NamedParameters = Annotated[_Value, Role.PARAMETERS]
"""The names of weights, as parameters."""


def check_options(options: Any) -> None:
    """Raises ValueError, with the option's name, for a value that the option's annotation doesn't admit."""
    hints = _type_hints(type(options))
    for field in fields_of(type(options)):
        value, hint = getattr(options, field.name), hints[field.name]
        if value is field.default:
            continue
        if not _fits(value, hint):
            raise ValueError(f"{field.name} must be {_spelled(hint)}, not {shown(value)}")
        problem = _problem(value, hint)
        if problem is not None:
            place, wanted, number = problem
            raise ValueError(f"{field.name}{place} must be {wanted}, not {shown(number)}")


def admits(cls: type, name: str, value: Any) -> bool:
    """Returns whether an option of a dataclass is of the type of a value, whatever its bounds."""
    hints = _type_hints(cls)
    return name not in hints or _fits(value, hints[name])


def sizes_of(options: Any) -> dict[str, int]:
    """Returns the options annotated as `Size` that have a value, by name."""
    hints = _type_hints(type(options))
    names = [field.name for field in fields_of(type(options))]
    sized = [name for name in names if _is_size(hints[name])]
    values = {name: getattr(options, name) for name in sized}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def options_for(cls: type, *roles: Role) -> tuple[str, ...]:
    """Returns the names of a config class's options that have one of some roles."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(map(_options_by_role(cls).__getitem__, roles))))


@functools.cache
def _options_by_role(cls: type) -> Mapping[Role, Sequence[str]]:
    """Returns the options of each role; an option that a subclass declares again keeps its role."""
    found: dict[Role, list[str]] = {role: [] for role in Role}
    for hints in _annotations_along(cls):
        for name, hint in hints.items():
            for role in _metadata(hint):
                if isinstance(role, Role):
                    found[role].append(name)
    return found


def _is_size(hint: Any) -> bool:
    return typing.get_args(Size)[1] in _metadata(hint)


def _metadata(hint: Any) -> Sequence[Any]:
    """Returns the metadata of a type, or of all types in a union."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return parts[1:] if isinstance(parts[0], type) else [*parts[1:], *_metadata(parts[0])]
    is_union = origin in (typing.Union, types.UnionType)
    return [each for part in parts if not isinstance(part, type) for each in _metadata(part)] if is_union else []


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return {name: hint for hints in reversed(_annotations_along(cls)) for name, hint in hints.items()}


def _annotations_along(cls: type) -> list[dict[str, Any]]:
    """Returns the annotations of a dataclass and of each dataclass above it."""
    return [_annotations(each) for each in cls.__mro__ if dataclasses.is_dataclass(each)]


@functools.cache  # evaluating a class's annotations, which are strings, is slow
def _annotations(cls: Any) -> dict[str, Any]:
    """Returns the types of the options that a class itself declares."""
    options = {field.name for field in fields_of(cls)}
    own = {name: hint for name, hint in inspect.get_annotations(cls).items() if name in options}
    # as for a class, names of the module come before its attributes
    module = getattr(sys.modules.get(cls.__module__), "__dict__", {})
    return typing.get_type_hints(types.SimpleNamespace(__annotations__=own), dict(vars(cls)), module, True)


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether `value` is of the annotated type.

    Lists, sets and tuples pass for each other, since JSON has only lists. An int passes for a float; a bool passes for
    neither.
    """
    if hint is Any or type(value) is hint:
        return True
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(value, parts[0])
    if origin is Literal:
        return value in parts
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is dict:
        key, content = parts
        return isinstance(value, Mapping) and all(_fits(k, key) and _fits(v, content) for k, v in value.items())
    if origin is tuple:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(parts)
            and all(_fits(inner, part) for inner, part in zip(value, parts, strict=True))
        )
    if origin is not None:
        return isinstance(value, list | tuple | set | frozenset) and all(_fits(part, parts[0]) for part in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _problem(value: Any, hint: Any) -> tuple[str, str, Any] | None:
    """Returns the first number out of bounds in a value of the annotated type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        for bounds in parts[1:]:
            if isinstance(bounds, Within):
                wanted = bounds.problem(value)
                return None if wanted is None else ("", wanted, value)
        return _problem(value, parts[0])
    if origin in (typing.Union, types.UnionType):
        return _problem(value, next(part for part in parts if _fits(value, part)))
    inside: Iterable[tuple[Any, Any, Any]] = ()
    if origin is dict:
        inside = ((key, inner, parts[1]) for key, inner in value.items())
    elif origin is tuple:
        inside = ((place, inner, part) for place, (inner, part) in enumerate(zip(value, parts, strict=True)))
    elif origin in (list, set) and typing.get_origin(parts[0]) is not None:
        inside = ((place, inner, parts[0]) for place, inner in enumerate(value))
    for key, inner, part in inside:
        found = _problem(inner, part)
        if found is not None:
            return f"[{shown(key)}]{found[0]}", *found[1:]
    return None


def _spelled(hint: Any) -> str:
    """Returns a type as text, as a config's class writes it, without bounds."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _spelled(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_spelled, parts))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, parts))}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_spelled, parts))}]"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


class TargetOptions(NamedTuple):
    """The options of a config that name modules and parameters; names and meanings are PEFT's.

    None means that the option isn't set, or that the method doesn't have it.

    Attributes:
        target_modules: The modules to adapt: a regular expression, or whole names and their ends.
        exclude_modules: The modules to leave out: a regular expression, or whole names and their ends.
        modules_to_save: The modules to train fully.
        layers_to_transform: The indices of the layers to adapt.
        layers_pattern: The names of containers of layers, before the index.
        target_parameters: The parameters to adapt: whole names and their ends.
        patterns: The options with values for single targets, such as ranks, by option; their keys are regular
            expressions for the ends of names.
    """

    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None
    target_parameters: Sequence[str] | None = None
    patterns: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
