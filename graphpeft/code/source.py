"""Finds the attributes that a class's forward uses by reading its code, such as the weights of submodules.

If a module reads the weight of a submodule, as ``F.linear(x, self.qkv.weight)`` does, the submodule's forward doesn't
run. A trace of the module would show this, but a model has hundreds of modules, and reading their code is faster.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dis
import functools
import inspect
import itertools
import operator
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeVar

from torch import nn

from graphpeft.code.attribute_paths import ANY, paths_in, paths_in_bytecode

_Result = TypeVar("_Result")


class Uses(NamedTuple):
    """The attributes that a forward, and the methods and functions that it calls, use.

    Attributes:
        read: The paths of attributes read from ``self``, such as ``qkv.weight``.
        read_elsewhere: The names of attributes read from other variables than ``self``, such as ``weight`` of
            ``layer.weight``, where ``layer`` may be a submodule.
    """

    read: set[str]
    read_elsewhere: set[str]


def cached_by_class(function: Callable[[type], _Result]) -> Callable[[type], _Result]:
    """Caches the results of a function of a class, until the class goes or `read_anew` is called.

    A class may be made for one module with a patched forward, and lead to the whole model.
    """
    known: weakref.WeakKeyDictionary[type, _Result] = weakref.WeakKeyDictionary()
    _KNOWN.append(known)

    @functools.wraps(function)
    def cached(cls: type) -> _Result:
        found: Any = known.get(cls, _ABSENT)
        if found is _ABSENT:
            found = known[cls] = function(cls)
        return found

    return cached


_ABSENT = object()
_KNOWN: list[weakref.WeakKeyDictionary[type, Any]] = []
"""The facts that were found out about classes by their code."""


def read_anew() -> None:
    """Forgets what was found out about classes, since methods and functions may be others by now."""
    for known in _KNOWN:
        known.clear()


@cached_by_class
def uses_in_forward(cls: type) -> Uses:
    """Returns the attributes that `cls`'s forward uses, found in its source, or in its bytecode without source."""
    uses = Uses(set(), set())
    methods = _methods_run(cls)
    # decorators from other Python modules may read attributes by any name, but read no weights
    own = {base.__module__ for base in cls.__mro__}
    for method in methods:
        for path in paths_in(method, has_self=True):
            if not path.startswith("*."):
                uses.read.add(path)
            elif path[2:] != ANY or method.__globals__.get("__name__") in own:
                uses.read_elsewhere.add(path[2:])
    reached = reached_in_forward(cls)
    for function in reached.functions:
        if function not in methods:
            may_be_any = function.__globals__.get("__name__") == cls.__module__
            uses.read_elsewhere.update(_read_by(function) - (set() if may_be_any else {ANY}))
    uses.read_elsewhere.update(reached.got)
    return uses


def _named_in(function: FunctionType, cls: type) -> list[Any]:
    """Returns the values of names in a function: globals, members of Python modules and `cls`, closure variables."""
    names, around = names_in(function.__code__).read, function.__globals__
    found = [*values_around(function), *_members_named(cls, names)]
    for name in names & around.keys():
        value = around[name]
        if issubclass(type(value), ModuleType):
            held = vars(value)
            found += [held[inner] for inner in names & held.keys()]
        else:
            found.append(value)
    return found


def _read_by(function: FunctionType) -> set[str]:
    """Returns the names of attributes that a function reads from any value, with `ANY` if a name is unknown."""
    return {path.removeprefix("*.") for path in paths_in_bytecode(function.__code__, None)}


def _methods_run(cls: type) -> dict[FunctionType, None]:
    """Returns a forward and the methods that it calls on ``self``, including properties and methods of base classes."""
    waiting, seen = list(_entries(cls)), set(_entries(cls))
    members = _members(cls).keys()
    found: dict[FunctionType, None] = {}
    while waiting:
        for method in _methods_named(cls, waiting.pop()):
            if method not in found and method.__module__ != nn.Module.__module__:
                found[method] = None
                paths = members & set(paths_in(method, has_self=True))
                waiting += paths - seen
                seen |= paths
    return found


def _entries(cls: type) -> list[str]:
    """Returns the names of the methods that a call of a module runs first."""
    own_call = getattr(cls, "__call__", None)  # noqa: B004
    if own_call is nn.Module.__call__:
        return ["forward"]
    return ["__call__", "forward"] if calls_forward(own_call) else ["__call__"]


_CALLED_BY = ("forward", "__call__")
"""The names of methods by which modules are called."""


def calls_forward(call: Any) -> bool:
    """Returns whether a user's ``__call__`` may call the forward, directly or through a base class."""
    code = getattr(inspect.unwrap(call), "__code__", None)
    return code is None or not names_in(code).read.isdisjoint(("forward", "super", "__call__", "_call_impl"))


def _of_bases(cls: type) -> frozenset[str]:
    """Returns the names that code uses for base classes of `cls`."""
    return frozenset(["super", *[base.__name__ for base in cls.__mro__]])


@cached_by_class
def _members(cls: type) -> Mapping[str, Any]:
    """Returns the members of a class and of its bases, by name."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        found.update(vars(base))
    return found


def _members_named(cls: type, names: Set[str]) -> list[Any]:
    """Returns the members of `cls` by their names; also hidden ones of bases if the names include a base."""
    if names.isdisjoint(_of_bases(cls)):
        members = _members(cls)
        return [members[name] for name in names & members.keys()]
    return [vars(base)[name] for base in cls.__mro__ for name in names & vars(base).keys()]


def _methods_named(cls: type, name: str) -> Iterator[FunctionType]:
    """Yields the functions that run with ``self`` for ``self.name``, including methods of bases that they call."""
    around = frozenset[str]()
    for base in cls.__mro__:
        member = vars(base).get(name)
        # the first argument of static methods and class methods isn't ``self``
        functions = () if isinstance(member, staticmethod | classmethod) else tuple(_functions_behind(member))
        for function in functions:
            yield function
            yield from (inner for inner in _closed_over(function) if inner.__name__ == name)  # the decorated function
        around = frozenset().union(*(names_in(function.__code__).read for function in functions))
        if name in vars(base) and (name not in around or around.isdisjoint(_of_bases(cls))):
            return


def _functions_behind(member: Any) -> Iterator[FunctionType]:
    """Yields the Python functions behind a member: a method, a property, or a partial, cached or decorated function."""
    # type(), since isinstance would read __class__, which user objects can override
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
    """Yields the functions in the closure of a function, such as the function that a decorator wraps."""
    for held in values_around(function):
        yield from _functions_behind(held)


def values_around(function: FunctionType) -> Iterator[Any]:
    """Yields the values in the closure of a function."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents


class Reached(NamedTuple):
    """The functions that code may run, and facts about the values that they name.

    Attributes:
        functions: The functions, each with whether it is only named, see `functions_called`.
        kinds: The types of the values.
        got: The names of attributes that functions made by ``operator.attrgetter`` read.
        has_tables: Whether modules are in a container among the values, by which code can tell them apart.
    """

    functions: Mapping[FunctionType, bool]
    kinds: Set[type]
    got: Set[str]
    has_tables: bool


def functions_in_forward(cls: type) -> Mapping[FunctionType, bool]:
    """Returns the functions that a forward may run, found by name, see `functions_called`."""
    return reached_in_forward(cls).functions


@cached_by_class
def reached_in_forward(cls: type) -> Reached:
    """Returns the functions that a forward may run, with facts about the values that they name."""
    return _reached(_members_named(cls, frozenset(_entries(cls))), cls)


def functions_called(starts: Iterable[Any], cls: type = object) -> Mapping[FunctionType, bool]:
    """Returns functions and all functions that they may run, found by the names in their code.

    Each function comes with whether it is only named: found as a global, a method or a closure variable, and not as one
    of `starts`, behind a property or partial function, or as a forward.
    """
    return _reached(starts, cls).functions


def _reached(starts: Iterable[Any], cls: type) -> Reached:
    waiting = [(start, False) for start in starts]
    found: dict[FunctionType, bool] = {}
    values: list[Any] = []
    while waiting:
        member, is_named = waiting.pop()
        is_named &= issubclass(type(member), FunctionType | functools._lru_cache_wrapper)
        for function in _functions_behind(member):
            is_known = function in found
            found[function] = is_named and found.get(function, True) and function.__name__ not in _CALLED_BY
            if is_known or _is_excluded(function):
                continue
            named = _named_in(function, cls)
            values += named
            waiting += [(value, True) for value in named]
    getters: Any = [value for value in values if type(value) is operator.attrgetter]
    return Reached(
        {function: is_named for function, is_named in found.items() if not _is_excluded(function)},
        set(map(type, values)),
        {name for getter in getters for path in getter.__reduce__()[1] for name in path.split(".")},
        any(is_table_of_modules(value) for value in values if type(value) in _CONTAINERS),
    )


def is_table_of_modules(value: Any) -> bool:
    """Returns whether a value is a container with modules in it, or in tuples in it."""
    return type(value) in _CONTAINERS and any(map(_has_module, itertools.islice(list(value), _LONGEST)))


def _has_module(key: Any) -> bool:
    return issubclass(type(key), nn.Module) or (type(key) is tuple and any(map(_has_module, key)))


_CONTAINERS = {
    dict, collections.defaultdict, collections.OrderedDict, weakref.WeakKeyDictionary,
    list, tuple, collections.deque, set, frozenset, weakref.WeakSet,
}  # fmt: skip
_LONGEST = 1000
"""The number of entries of a container that are looked at, which may have a million."""


def _is_excluded(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] in _EXCLUDED_PACKAGES  # generated code has no __module__


_EXCLUDED_PACKAGES = sys.stdlib_module_names | {"numpy", "torch", "graphpeft"}
"""Packages whose functions aren't searched: they read no attributes by names that the model's code determines."""


class Names(NamedTuple):
    """Names in a function's code and in the code of functions inside it.

    Attributes:
        read: The names of globals and attributes.
        made: The names of globals that the code assigns.
        texts: Texts among the constants.
    """

    read: frozenset[str]
    made: frozenset[str]
    texts: frozenset[str]


@functools.cache
def names_in(code: CodeType) -> Names:
    """Returns the names in `code`."""
    inside = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    # each instruction has its opcode in its first byte of two
    instructions = dis.get_instructions(code) if _STORES_GLOBAL in code.co_code[::2] else ()
    made = frozenset([str(each.argval) for each in instructions if each.opname == "STORE_GLOBAL"])
    read, texts = frozenset(code.co_names), frozenset([each for each in code.co_consts if type(each) is str])
    every = [Names(read, made, texts), *inside]
    return Names(*[frozenset().union(*of_kind) for of_kind in zip(*every, strict=True)]) if inside else every[0]


_STORES_GLOBAL = bytes([dis.opmap["STORE_GLOBAL"]])

_LOGGING_NAMES = {"_assert", "print", "log", "debug", "info", "warning", "warning_once", "warn", "warn_once", "error"}
"""Names of logging and warning functions."""


@functools.cache
def is_logging_call(code: CodeType, line: int) -> bool:
    """Returns whether the statement of `code` at `line` of its file is a logging or warning call."""
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


def is_of_pytorch(cls: type) -> bool:
    """Returns whether a class is one of PyTorch's, or built in."""
    return cls.__module__.partition(".")[0] in ("torch", "builtins")
