"""Finds all state that a forward can reach and change: its modules, their objects, and names in the user's code.

The search leads from a module to its attributes, hooks and class; from a class to its attributes, methods and bases;
from a function to its closure variables, the globals that it names and its defaults. It follows a method only if
reached code contains its name: ``forward`` and the methods that it calls, not all methods of a class. It ends at the
code of libraries, which store no state that a forward changes.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Set
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from graphpeft._torch import FORWARD_HOOKS_OF_ALL
from graphpeft.code.contents import CONTAINERS, PLAIN, parts_of
from graphpeft.code.namespaces import Namespace, attributes_of, slots_of
from graphpeft.code.source import names_in, values_around

_TEST_PACKAGES = {"_hypothesis_pytestplugin", "_pytest", "hypothesis", "pluggy", "pytest"}
"""Packages that run tests. Pytest rewrites assertions to call them, so the search would lead there."""

_LIBRARIES = sys.stdlib_module_names | _TEST_PACKAGES | {
    "einops", "graphpeft", "numpy", "timm", "torch", "torchaudio", "torchvision", "transformers",
}  # fmt: skip
"""Packages whose functions and classes store no state that a forward changes."""

_HOLDING_USER_STATE = {"_thread", "_weakrefset", "argparse", "collections", "types", "weakref"}
"""Python modules of the standard library whose objects can hold state of the user."""

_STATELESS_PACKAGES = (sys.stdlib_module_names - _HOLDING_USER_STATE) | _TEST_PACKAGES | {"graphpeft", "numpy", "torch"}
"""Packages whose objects hold no state that a forward changes."""

_CONTAINERS_AND_TUPLES = (*CONTAINERS, tuple)
_PLAIN_CONTAINERS = frozenset((*_CONTAINERS_AND_TUPLES, OrderedDict))


class Reach:
    """The namespaces that the forwards of a module and its submodules can reach, and which modules reach each.

    Attributes:
        names: The names in reached code.
    """

    def __init__(self, root: nn.Module) -> None:
        self._namespaces: dict[Hashable, Namespace] = {}
        self._owners: dict[Hashable, list[nn.Module]] = {}
        self._inside = set(root.modules())
        # holds the start value, too, so that its id isn't reused
        self._known: dict[int, tuple[Any, list[Namespace]]] = {}
        starts = {module: list(_starts(module)) for module in self._inside}
        self.names = {"forward"}
        self._note_names([value for values in starts.values() for value in values])
        for module in root.modules():
            self._note(Namespace.of_object(module), module)
            for value in starts[module]:
                for namespace in self._reachable_from(value):
                    self._note(namespace, module)

    def _note_names(self, starts: Iterable[Any]) -> None:
        """Notes the names in the code of the user's functions that may run; a method does if reached code names it."""
        waiting, seen = list(starts), dict[int, Any]()
        unnamed: defaultdict[str, list[Any]] = defaultdict(list)
        while waiting:
            value = waiting.pop()
            kind = type(value)  # isinstance would read __class__, which user objects can override
            if kind in PLAIN or id(value) in seen or (issubclass(kind, nn.Module) and value in self._inside):
                continue
            seen[id(value)] = value
            waiting += opened(value, self.names)[1]
            if issubclass(kind, type) and _is_of_a_user(value):
                for name, method in _methods(value).items():
                    if name not in self.names:
                        unnamed[name].append(method)
            elif kind is FunctionType and not is_of_a_library(value.__globals__.get("__name__")):
                new = names_in(value.__code__).read - self.names
                self.names |= new
                waiting += [method for name in new for method in unnamed.pop(name, ())]

    @property
    def namespaces(self) -> Iterable[Namespace]:
        """The namespaces."""
        return self._namespaces.values()

    def owners(self, namespace: Namespace) -> list[nn.Module]:
        """Returns the modules that can reach a namespace; a module's own namespace belongs to this module alone."""
        return self._owners[namespace.key]

    def _note(self, namespace: Namespace, module: nn.Module) -> None:
        self._namespaces.setdefault(namespace.key, namespace)
        owners = self._owners.setdefault(namespace.key, [])
        if not owners or owners[-1] is not module:
            owners.append(module)

    def _reachable_from(self, start: Any) -> list[Namespace]:
        """Returns the namespaces that can be reached from a value."""
        if id(start) not in self._known:
            self._known[id(start)] = (start, list(self._found_from(start)))
        return self._known[id(start)][1]

    def _found_from(self, start: Any) -> Iterator[Namespace]:
        # bases are searched once, since many classes share them
        for base in start.__bases__ if issubclass(type(start), type) and _is_of_a_user(start) else ():
            yield from self._reachable_from(base)
        seen: dict[int, Any] = {}
        waiting = [start]
        while waiting:
            value = waiting.pop()
            if type(value) not in PLAIN and id(value) not in seen:
                seen[id(value)] = value
                if not issubclass(type(value), nn.Module) or value not in self._inside:
                    namespaces, further = opened(value, self.names)
                    yield from namespaces
                    waiting += further


def is_iterator(value: Any) -> bool:
    """Returns whether `value` is an iterator without attributes, whose position can't be read or restored."""
    return hasattr(type(value), "__next__") and attributes_of(value) is None


def _starts(module: nn.Module) -> Iterator[Any]:
    """Yields the class of a module, its hooks, and the values of its attributes and of containers there."""
    yield type(module)
    waiting = [*module.__dict__.values(), *FORWARD_HOOKS_OF_ALL]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if type(value) in PLAIN:
            continue
        if type(value) not in _PLAIN_CONTAINERS:
            yield value
        elif value and id(value) not in seen:
            seen.add(id(value))
            waiting += parts_of(value)


def functions_held(module: nn.Module) -> Iterator[FunctionType]:
    """Yields the user's functions in a module's attributes and hooks, in containers there, and in their closures."""
    _, *waiting = _starts(module)
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        # type(), since a trace patches isinstance and would record a check of a proxy's class
        if not issubclass(type(value), _MAY_HOLD_FUNCTIONS) or id(value) in seen:
            continue
        seen.add(id(value))
        if not issubclass(type(value), FunctionType):
            waiting += opened(value)[1]
        elif not is_of_a_library(value.__module__):
            yield value
            waiting += values_around(value)


_MAY_HOLD_FUNCTIONS = (
    FunctionType,
    MethodType,
    functools.partial,
    functools._lru_cache_wrapper,
    *_CONTAINERS_AND_TUPLES,
)


_Opened = tuple[Iterable[Namespace], Iterable[Any]]


def opened(value: Any, named: Set[str] = frozenset()) -> _Opened:
    """Returns the namespaces of a value and the values in them; of a class's methods only those `named`."""
    # type(), since isinstance would read __class__, which user objects can override
    kind = type(value)
    if issubclass(kind, FunctionType):
        return _opened_function(value)
    if issubclass(kind, type):
        return _opened_class(value, named)
    if issubclass(kind, MethodType):
        return (), (value.__self__, value.__func__)
    if issubclass(kind, functools.partial):
        return (), (value.func, value.args, value.keywords)
    if issubclass(kind, staticmethod | classmethod | functools._lru_cache_wrapper):
        return (), (value.__wrapped__,)
    if issubclass(kind, property):
        return (), (value.fget, value.fset)
    if issubclass(kind, functools.cached_property):
        return (), (value.func,)
    parts = parts_of(value) if issubclass(kind, _CONTAINERS_AND_TUPLES) else ()
    if issubclass(kind, ModuleType) or _root(kind) in _STATELESS_PACKAGES:
        return (), parts
    attributes, slots = attributes_of(value), slots_of(kind)
    if attributes is None and not slots:
        return (), parts
    namespaces = [Namespace.of_object(value)] if attributes is not None else []
    namespaces += [Namespace.of_slots(value)] if slots else []
    return namespaces, (kind, *parts, *(held for namespace in namespaces for held in namespace.values().values()))


def _opened_class(cls: type, named: Set[str]) -> _Opened:
    if not _is_of_a_user(cls):
        return (), ()
    methods = _methods(cls)
    members = [value for name, value in vars(cls).items() if name not in methods and name not in _CLASS_INTERNALS]
    return (Namespace.of_class(cls),), (*members, *(methods[name] for name in methods.keys() & named), *cls.__bases__)


def _methods(cls: type) -> dict[str, Any]:
    """Returns the methods and properties of a class that code calls by name; Python calls special methods itself."""
    kinds = (FunctionType, staticmethod, classmethod, property, functools.cached_property)
    methods = {name: value for name, value in vars(cls).items() if issubclass(type(value), kinds)}
    # no forward makes modules, so a module's __init__ runs only if code names it
    made = issubclass(cls, nn.Module)
    return {name: value for name, value in methods.items() if not _is_special(name) or (made and name == "__init__")}


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


_CLASS_INTERNALS = frozenset(("__annotations__", "__dict__", "__doc__", "__module__", "__weakref__"))


def _opened_function(function: FunctionType) -> _Opened:
    if is_of_a_library(function.__globals__.get("__name__")):
        return (), tuple(function.__dict__.values())  # such as __wrapped__ of a decorator
    code, own = function.__code__, Namespace.of_function(function)
    cells = [
        Namespace.of_cell(cell, name, function)
        for cell, name in zip(function.__closure__ or (), code.co_freevars, strict=True)
    ]
    named = list(_globals_named_by(code, function.__globals__))
    further = [value for namespace in (*cells, *named, own) for value in namespace.values().values()]
    made = names_in(code).made
    return (*cells, *(each for each in named if _may_change(each, made)), own), further


def _globals_named_by(code: CodeType, globals_there: dict[str, Any]) -> Iterator[Namespace]:
    names = names_in(code)
    named = [name for name in globals_there if name != "__builtins__"] if "globals" in names.read else names.read
    for name in named:
        value: Any = globals_there.get(name)
        if issubclass(type(value), ModuleType):
            if not is_of_a_library(value.__name__):
                yield from (Namespace.of_global(vars(value), inner) for inner in names.read if inner in vars(value))
        elif name in globals_there:
            yield Namespace.of_global(globals_there, name)
    yield from (Namespace.of_global(globals_there, name) for name in names.made if name not in globals_there)


def _may_change(named: Namespace, made: frozenset[str]) -> bool:
    """Returns whether a global may change: its code assigns it, or its value isn't a function or a class."""
    kinds = FunctionType | BuiltinFunctionType | type
    values = named.values()
    return not values or any(name in made or not issubclass(type(value), kinds) for name, value in values.items())


def _is_of_a_user(cls: type) -> bool:
    return not is_of_a_library(cls.__module__)


def _root(cls: type) -> str:
    return str(cls.__module__).partition(".")[0]


def is_of_a_library(python_module: Any) -> bool:
    """Returns whether a Python module belongs to a library whose functions store no state that a forward changes.

    This holds for known libraries, and for each installed package that defines no ``nn.Module``, such as SymPy.
    """
    root = python_module.partition(".")[0] if isinstance(python_module, str) else ""
    return root in _LIBRARIES or (_is_installed(root) and root not in _defining_modules(len(sys.modules)))


@functools.lru_cache(maxsize=4096)
def _is_installed(root: str) -> bool:
    package = sys.modules.get(root)
    files = (getattr(package, "__file__", None), *getattr(package, "__path__", ()))
    return any(isinstance(file, str) and not _INSTALLED.isdisjoint(Path(file).parts) for file in files)


_INSTALLED = frozenset(("site-packages", "dist-packages"))
"""Names of folders with installed packages."""


@functools.lru_cache(maxsize=1)
def _defining_modules(_imported: int) -> frozenset[str]:
    """Returns the packages that define ``nn.Module`` classes; the number of imported modules is the cache's key."""
    waiting: list[type] = [nn.Module]
    seen: set[type] = set()
    while waiting:
        new = [cls for cls in waiting.pop().__subclasses__() if cls not in seen]
        seen.update(new)
        waiting += new
    return frozenset(map(_root, seen))
