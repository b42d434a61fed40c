"""Finds hooks and ``__call__`` methods that read a weight around the forward in whose graph its adapter acts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

from graphpeft._torch import FORWARD_HOOKS_OF_ALL
from graphpeft.code.attribute_paths import ANY, paths_in
from graphpeft.code.source import cached_by_class, functions_called, read_by
from graphpeft.graph import in_place
from graphpeft.graph.kept_forwards import name_of
from graphpeft.graph.paths import within
from graphpeft.sites.held import reached_from

_INTO_FORWARD = "put what it does with that into the forward"
_TRACED = f"{_INTO_FORWARD}, or adapt a graph of the whole model, graphpeft.trace(model, example_inputs), which has it"
_REMOVED = "remove it"

_KINDS = {
    "_forward_pre_hooks": ("forward pre-hook", _TRACED),
    "_forward_hooks": ("forward hook", _TRACED),
    "_backward_pre_hooks": ("backward pre-hook", _REMOVED),
    "_backward_hooks": ("backward hook", _REMOVED),
}
"""Hooks by the attributes of modules that hold them, for a person, each kind with a way out."""


class Around(NamedTuple):
    """Code that runs around the forward of a module.

    Attributes:
        path: The path of the module; None for a hook of all modules.
        description: A description for a person.
        way_out: What lets adapters act, for a person.
        names: The names of the attributes that it may read, with `ANY` if that may be any.
        places: The paths of the modules whose attributes it may read.
        parameters: The ids of the parameters that it holds itself, as in a closure.
    """

    path: str | None
    description: str
    way_out: str
    names: Set[str]
    places: Set[str]
    parameters: Set[int]


class AroundForwards:
    """The hooks and ``__call__`` methods of one model that read attributes of modules.

    Args:
        modules: The model's modules by path.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._of_owners: dict[int, list[Any]] = {}

    def reading(self, owner: str, attribute: str, skips: Callable[[str], bool]) -> Around | None:
        """Returns what may read a tensor around a forward, or None.

        Args:
            owner: The path of the module that owns the tensor.
            attribute: The tensor's name there.
            skips: Tells by its path whether a module's hooks and ``__call__`` don't matter.
        """
        tensor = self._modules[owner]._parameters.get(attribute)
        for around in self._all:
            if around.path is not None and skips(around.path):
                continue
            if id(tensor) in around.parameters or _reads(around, owner, attribute):
                return around
        return None

    @functools.cached_property
    def _all(self) -> list[Around]:
        paths = {id(module): path for path, module in self._modules.items()}
        return [found for found in self._found(paths) if found.names or found.parameters]

    def _found(self, paths: Mapping[int, str]) -> Iterator[Around]:
        for hooks in FORWARD_HOOKS_OF_ALL:
            for hook in hooks.values():
                yield self._of_hook(None, "a hook of all modules", _REMOVED, hook, nn.Module, paths)
        for path, module in self._modules.items():
            cls = in_place.original_class(module)
            names = _read_by_call(cls)
            if names:
                description = f"the __call__ of {path or 'the model'} ({cls.__name__})"
                yield Around(path, description, _TRACED if path else _INTO_FORWARD, names, {path}, set())
            for kind, (said, way_out) in _KINDS.items():
                for hook in vars(module)[kind].values():
                    yield self._of_hook(path, f"a {said} of {path or 'the model'}", way_out, hook, cls, paths)

    def _of_hook(
        self, path: str | None, description: str, way_out: str, hook: Any, cls: type, paths: Mapping[int, str]
    ) -> Around:
        functions = _functions_around(hook, _without_forward(cls))
        held = self._held(hook) if functions else []
        places = {paths[id(value)] for value in held if id(value) in paths}
        if path is not None:
            places.add(path)
        in_hand = {id(value) for value in held if isinstance(value, nn.Parameter)}
        return Around(path, f"{description} ({name_of(hook)})", way_out, _read_by_any(functions), places, in_hand)

    def _held(self, hook: Any) -> list[Any]:
        """Returns all that a hook leads to; one walk serves all methods of an object, which may have much."""
        if not isinstance(hook, MethodType):
            return [value for value, _ in reached_from(hook)]
        owner = hook.__self__
        if id(owner) not in self._of_owners:
            self._of_owners[id(owner)] = [owner, *(value for value, _ in reached_from(owner))]
        return [*self._of_owners[id(owner)], *(value for value, _ in reached_from(hook.__func__))]


_WALKS = {"modules", "named_modules", "children", "named_children", "get_submodule"}
"""Methods that lead from a module to modules inside, whichever they are."""


def _reads(around: Around, owner: str, attribute: str) -> bool:
    above = [place for place in around.places if not place or owner == place or owner.startswith(f"{place}.")]
    if ANY in around.names:
        return around.path is None or bool(above)
    return attribute in around.names and (
        around.path is None
        or (bool(above) and not around.names.isdisjoint(_WALKS))
        or any(
            all(name.isdigit() or name in around.names for name in within(owner, place).split(".") if name)
            for place in above
        )
    )


@cached_by_class
def _read_by_call(cls: Any) -> set[str]:
    if cls.__call__ is nn.Module.__call__:
        return set()
    return _read_by_any(_functions_around(cls.__call__, _without_forward(cls)))


@cached_by_class
def _without_forward(cls: type) -> type:
    """Returns a class for readers of code, without the forward, where adapters act."""
    return in_place.quiet_subclass(cls, {"forward": nn.Module.forward})


def _functions_around(start: Any, cls: type) -> set[FunctionType]:
    """Returns the functions that a hook or a ``__call__`` may run beside the forward, but for PyTorch's.

    Args:
        start: The hook, or the ``__call__``: a function, a method, a partial function, or an object that is called.
        cls: The class of the module with which it runs, without its forward.
    """
    found: set[FunctionType] = set()
    waiting = [*_parts(start)]
    classes = dict.fromkeys([cls, *map(type, waiting)])
    while waiting:
        new = {function for each in classes for function in functions_called(waiting, each)} - found
        found |= new
        waiting = [*new]
    return found


def _read_by_any(functions: Iterable[FunctionType]) -> set[str]:
    """Returns the names of attributes that functions read from any value, with `ANY` if a name is unknown."""
    return set[str]().union(*map(_read_by, functions))


def _parts(start: Any) -> Iterator[Any]:
    """Yields the functions that run in a call of an object, and the objects that hold them."""
    kind = type(start)
    if issubclass(kind, functools.partial):
        yield from start.args
        yield from start.keywords.values()
        yield from _parts(start.func)
    elif issubclass(kind, MethodType):
        yield start.__self__
        yield start.__func__
    elif issubclass(kind, FunctionType):
        yield start
    else:
        yield start
        yield from _parts(kind.__call__)


def _read_by(function: FunctionType) -> set[str]:
    in_source = {path.removeprefix("*.") for path, _ in paths_in(function, has_self=False)}
    # Python has a lambda's source by lines, with the code around it
    return in_source & read_by(function) if function.__name__ == "<lambda>" else in_source
