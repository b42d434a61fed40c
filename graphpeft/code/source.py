"""Reads from a class's code which attributes its forward uses, among them the weights of modules inside it.

A weight that another module reads, as ``F.linear(x, self.qkv.weight)`` does, is not reached through the forward of the
module that owns it. A trace of that other module would tell, but a model has hundreds of modules; their code is quick
to read.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import inspect
import operator
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Set
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from graphpeft.code.attribute_paths import ANY, paths_in, paths_in_bytecode


class Uses(NamedTuple):
    """What a forward, and the methods and functions that it calls, use of the module.

    Attributes:
        read: The attributes of ``self`` whose values are read, by their paths such as ``qkv.weight``.
        called: The attributes of ``self`` that are called.
        read_elsewhere: The names of attributes that are read from something else than a path from ``self``, such as
            ``layer.weight``, where ``layer`` may be a module inside.
    """

    read: set[str]
    called: set[str]
    read_elsewhere: set[str]


@functools.cache
def uses_in_forward(cls: type) -> Uses:
    """Returns what `cls`'s forward uses: by its source, or by its bytecode where it has none."""
    uses = Uses(set(), set(), set())
    methods = _methods_run(cls)
    # what others wrap around forwards looks at attributes of all kinds, and reads no weights
    own = {base.__module__ for base in cls.__mro__}
    for method in methods:
        for path, is_call in paths_in(method, has_self=True):
            if not path.startswith("*."):
                (uses.called if is_call else uses.read).add(path)
            elif path[2:] != ANY or method.__globals__.get("__name__") in own:
                uses.read_elsewhere.add(path[2:])
    for function in functions_in_forward(cls):
        if function not in methods:
            may_be_any = function.__globals__.get("__name__") == cls.__module__
            uses.read_elsewhere.update(read_by(function) - (set() if may_be_any else {ANY}))
    for value in _named_in(functions_in_forward(cls), cls):
        if type(value) is operator.attrgetter:
            reduced: Any = value.__reduce__()
            uses.read_elsewhere.update(name for path in reduced[1] for name in path.split("."))
    return uses


def _named_in(functions: Iterable[FunctionType], cls: type) -> Iterator[Any]:
    """Yields what functions name: globals, members of Python modules and of `cls`, and the variables around them."""
    for function in functions:
        yield from values_around(function)
        names = names_in(function.__code__).read
        for name in names:
            yield from _members(cls, name, names)
            named = function.__globals__.get(name)
            yield from (vars(named).get(n) for n in names) if issubclass(type(named), ModuleType) else (named,)


def read_by(function: FunctionType) -> set[str]:
    """Returns the names of attributes that a function reads from whatever it is given; `ANY` if it may be any."""
    return {path.removeprefix("*.") for path, _ in paths_in_bytecode(function.__code__, None)}


def _methods_run(cls: type) -> dict[FunctionType, None]:
    """Returns a forward with the methods that it calls on ``self``, those of base classes and properties among them."""
    waiting, seen = list(_entries(cls)), set(_entries(cls))
    found: dict[FunctionType, None] = {}
    while waiting:
        for method in _methods_named(cls, waiting.pop()):
            if method not in found and method.__module__ != nn.Module.__module__:
                found[method] = None
                paths = {path for path, _ in paths_in(method, has_self=True)}
                waiting += paths - seen
                seen |= paths
    return found


def _entries(cls: type) -> list[str]:
    """Returns the names of the methods by which a module is called."""
    own_call = getattr(cls, "__call__", None)  # noqa: B004
    if own_call is nn.Module.__call__:
        return ["forward"]
    return ["__call__", "forward"] if calls_forward(own_call) else ["__call__"]


_CALLED_BY = ("forward", "__call__")
"""The names of methods by which modules are called."""


def calls_forward(call: Any) -> bool:
    """Returns whether a ``__call__`` of a user's may call the forward, by itself or by that of a base class."""
    code = getattr(inspect.unwrap(call), "__code__", None)
    return code is None or not names_in(code).read.isdisjoint(("forward", "super", "__call__", "_call_impl"))


def _of_bases(cls: type) -> frozenset[str]:
    """Returns the names by which code refers to base classes of `cls`."""
    return frozenset(("super", *(base.__name__ for base in cls.__mro__)))


def _members(cls: type, name: str, around: Set[str]) -> list[Any]:
    """Returns what `cls` has of a name; that of its bases, too, where the code `around` it names these."""
    found = [vars(base)[name] for base in cls.__mro__ if name in vars(base)]
    return found[:1] if around.isdisjoint(_of_bases(cls)) else found


def _methods_named(cls: type, name: str) -> Iterator[FunctionType]:
    """Yields the functions that run with ``self`` if `name` is read from an instance of `cls`: those of bases, too."""
    around = frozenset[str]()
    for base in cls.__mro__:
        member = vars(base).get(name)
        # the first argument of others is no instance
        functions = () if isinstance(member, staticmethod | classmethod) else tuple(_functions_behind(member))
        for function in functions:
            yield function
            yield from (inner for inner in _closed_over(function) if inner.__name__ == name)  # it is decorated
        around = frozenset().union(*(names_in(function.__code__).read for function in functions))
        if name in vars(base) and (name not in around or around.isdisjoint(_of_bases(cls))):
            return


def _functions_behind(member: Any) -> Iterator[FunctionType]:
    """Yields the functions in Python that run if what a class, a Python module or an object has is read or called."""
    # not isinstance, which asks an object of a user's for its __class__
    while (kind := type(member)) is not FunctionType:
        if issubclass(kind, functools.partial | functools.partialmethod | functools.cached_property):
            member = member.func
        elif issubclass(kind, staticmethod | classmethod | functools._lru_cache_wrapper):
            member = member.__wrapped__
        elif issubclass(kind, MethodType):
            member = member.__func__
        elif issubclass(kind, property):
            member = member.fget
        else:
            return
    yield member
    wrapped = member.__dict__.get("__wrapped__")
    if wrapped is not None and wrapped is not member:
        yield from _functions_behind(wrapped)


def _closed_over(function: FunctionType) -> Iterator[FunctionType]:
    """Yields the functions in the variables around a function, such as what it decorates."""
    for held in values_around(function):
        yield from _functions_behind(held)


def values_around(function: FunctionType) -> Iterator[Any]:
    """Yields the values of the variables around a function."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents


@functools.cache
def functions_in_forward(cls: type) -> Mapping[FunctionType, bool]:
    """Returns the functions that a forward runs, as far as their names tell: itself, methods, and those of its file.

    With each, whether it is only found by name, see `functions_called`.
    """
    return functions_called([member for entry in _entries(cls) for member in _members(cls, entry, frozenset())], cls)


def functions_called(starts: Iterable[Any], cls: type = object) -> Mapping[FunctionType, bool]:
    """Returns functions and those that they run, as far as names tell: methods of `cls`, and those of their files.

    With each, whether it is only found by a name: as a global, a method or a variable around a function, and neither as
    one of `starts`, nor behind a property, a partial function or the like, nor as a forward.

    Args:
        starts: The functions, or what leads to some: methods, partial functions and the like.
        cls: The class.
    """
    waiting = [(start, False) for start in starts]
    found: dict[FunctionType, bool] = {}
    while waiting:
        member, is_named = waiting.pop()
        is_named &= issubclass(type(member), FunctionType | functools._lru_cache_wrapper)
        for function in _functions_behind(member):
            is_known = function in found
            found[function] = is_named and found.get(function, True) and function.__name__ not in _CALLED_BY
            if is_known or _is_the_end(function):
                continue
            waiting += [(value, True) for value in _named_in([function], cls)]
    return {function: is_named for function, is_named in found.items() if not _is_the_end(function)}


def _is_the_end(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] in _ENDS  # generated code is of no Python module


_ENDS = sys.stdlib_module_names | {"numpy", "torch", "graphpeft"}
"""Whose functions read nothing of a model but what they are there for."""


class Names(NamedTuple):
    """Names in a function's code and in that of functions inside it.

    Attributes:
        read: Those of globals and attributes.
        made: Those of globals that it gives a value.
    """

    read: frozenset[str]
    made: frozenset[str]


@functools.cache
def names_in(code: CodeType) -> Names:
    """Returns the names in `code`."""
    inside = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    made = frozenset(
        str(instruction.argval)
        for instruction in (dis.get_instructions(code) if _STORES_GLOBAL in code.co_code else ())
        if instruction.opname == "STORE_GLOBAL"
    )
    read = frozenset(code.co_names)
    return Names(read.union(*(names.read for names in inside)), made.union(*(names.made for names in inside)))


_STORES_GLOBAL = bytes([dis.opmap["STORE_GLOBAL"]])

_LOGGING_NAMES = {"_assert", "print", "log", "debug", "info", "warning", "warning_once", "warn", "warn_once", "error"}
"""Names of logging and warning functions."""


@functools.cache
def is_logging_call(code: CodeType, line: int) -> bool:
    """Returns whether `code` only logs or warns at `line` of its file."""
    try:
        lines, start = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return False
    here = line - max(start, 1) + 1
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= here <= (n.end_lineno or n.lineno)]
    innermost = min(around, key=lambda n: (n.end_lineno or n.lineno) - n.lineno, default=None)
    if not isinstance(innermost, ast.Expr) or not isinstance(innermost.value, ast.Call):
        return False
    function = innermost.value.func
    return getattr(function, "attr", getattr(function, "id", None)) in _LOGGING_NAMES


@functools.cache
def methods_reading(cls: type, attribute: str) -> frozenset[str]:
    """Returns the names of `cls`'s methods that read an attribute of ``self``, called by its forward or not."""
    of_users = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    names = {name for base in of_users for name, value in vars(base).items() if inspect.isfunction(value)}
    names.discard("reset_parameters")  # by convention what fills the weights, before anything adapts them
    return frozenset(name for name in names if _reads(inspect.unwrap(getattr(cls, name)), attribute))


def _reads(method: Any, attribute: str) -> bool:
    paths = paths_in(method, has_self=True) if inspect.isfunction(method) else ()
    return any(path == attribute or path.startswith(f"{attribute}.") for path, _ in paths)
