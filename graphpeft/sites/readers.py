"""Finds modules that read weights of other modules without calling them: from code, held objects and graphs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft.code.attribute_paths import ANY
from graphpeft.code.source import Uses, cached_by_class, has_functional_call, methods_reading, uses_in_forward
from graphpeft.graph import in_place, ops
from graphpeft.graph.computed_weights import has_tensor
from graphpeft.graph.forward_classes import class_of_forward
from graphpeft.graph.holders import has_own_modules, tree_of
from graphpeft.graph.paths import join, within
from graphpeft.peft_errors import PeftWarning
from graphpeft.sites.held import (
    has_hooks,
    held_by,
    held_outside,
    is_of_pytorch,
    read_by_what_is_given,
    read_through,
)
from graphpeft.sites.regions import Regions
from graphpeft.sites.site import NoSiteError

_READ_METADATA_ONLY = (nn.TransformerEncoder,)
"""Classes whose forward reads only metadata of submodules' weights, such as the device."""


class Readers:
    """The readers of weights in one model.

    Args:
        regions: The model's modules and their graphs.
    """

    def __init__(self, regions: Regions) -> None:
        self._regions = regions
        modules = regions.modules
        # a graph shows its own reads
        code = {path: module for path, module in modules.items() if path not in regions.graphs}
        outer = {path: module for path, module in code.items() if has_own_modules(module)}
        held = {path: held_by(module) for path, module in code.items() if path in outer or not is_of_pytorch(module)}
        outer = {path: module for path, module in outer.items() if not _is_fast_path_disabled(module)}
        self._by_code = _read_by_code(outer, modules)
        self._may_read = _may_read(outer, held, modules)
        self._called_with_others = {
            join(path, inside): path for path, may in self._may_read.items() for inside in may.called_with_others
        }
        self._called_in_function = {
            join(path, inside): path for path, may in self._may_read.items() for inside in may.called_in_function
        }
        self._held = held_outside(modules, held)
        self._around: dict[str, list[tuple[str, MayRead]]] = {}

    def of(self, owner: str, attribute: str) -> list[str]:
        """Returns the paths of modules around the owner of a tensor that read it without calling the owner.

        Args:
            owner: The path of the module that owns the tensor.
            attribute: The tensor's name in its owner.

        Raises:
            NoSiteError: If the readers can't be known, or a module elsewhere may read the tensor.
        """
        if self._called_with_others or self._called_in_function:
            self._refuse_replaced(owner)
            self._warn_of_lost_gradients(owner)
        return (
            self._by_code.get((owner, attribute)) or self._hidden(owner, attribute) or self._outside(owner, attribute)
        )

    def _refuse_replaced(self, owner: str) -> None:
        """Raises NoSiteError if a module may be called with a tensor in the place of the one that `owner` has."""
        for called, caller in _around(owner, self._called_with_others):
            raise NoSiteError(
                f"{caller or 'the model'} calls {called} by torch.func.functional_call, with other weights in place of "
                "its own, and so without what an adapter would change in them"
            )

    def _warn_of_lost_gradients(self, owner: str) -> None:
        """Warns once of each module that may call what has the tensor where no gradient is recorded."""
        for called, caller in _around(owner, self._called_in_function):
            del self._called_in_function[called]
            warnings.warn(
                f"{caller or 'the model'} may call {called} in a torch.autograd.Function. Its backward runs only if an "
                "input requires a gradient, and adapters inside get none without it: let inputs require gradients, as "
                "enable_input_require_grads() does; check_learning(model, batch) tells what learns",
                PeftWarning,
                stacklevel=2,
            )

    def _hidden(self, owner: str, attribute: str) -> list[str]:
        """Returns the modules around `owner` that read the weight though their code doesn't show it, or may do so."""
        if not self._may_read or not owner:
            return []
        around = owner.rpartition(".")[0]
        suspects = self._around.get(around)
        if suspects is None:
            suspects = self._around[around] = self._suspects(around)
        return [
            path
            for path, may in suspects
            if attribute in may.names or ANY in may.names or (may.handed_on and within(owner, path) in may.handed_on)
            if self._may_read_it(path, within(owner, path), attribute)
        ]

    def _suspects(self, path: str) -> list[tuple[str, MayRead]]:
        """Returns the modules at and around `path`, innermost first, with what each may read of its submodules."""
        found = []
        nearest: str | None = None
        while True:
            if self._regions.is_called(path):
                nearest = path if nearest is None else nearest
                may = self._may_read.get(path)
                if may is not None and in_place.original_class(self._regions.modules[path]) not in _READ_METADATA_ONLY:
                    # modules further out hand on the modules between, which are suspects themselves
                    is_all = path == nearest or (ANY not in may.names and not may.handed_on)
                    found.append((path, may if is_all else MayRead(may.names - {ANY}, frozenset())))
            if not path:
                return found
            path = path.rpartition(".")[0]

    def _may_read_it(self, path: str, inside: str, attribute: str) -> bool:
        """Returns whether a module reads a weight inside the module, or has no graph that tells."""
        template = self._regions.template(path)
        if template is not None:
            return any(ops.reads(graph, f"{inside}.{attribute}") for graph in template.graphs)
        return inside not in uses_in_forward(class_of_forward(self._regions.modules[path])).called

    def _outside(self, owner: str, attribute: str) -> list[str]:
        """Returns a module around `owner` whose graph reads the weight through an unregistered object.

        Raises:
            NoSiteError: If a module elsewhere may do so, since only the graph of the whole model has both modules.
        """
        for path, name in self._held.get((owner, attribute), ()):
            if path and not owner.startswith(f"{path}."):
                raise NoSiteError(
                    f"{path} may read its {attribute} by what it holds in self.{name}, where no adapter of its module "
                    "acts; adapt a graph of the whole model, graphpeft.trace(model, example_inputs)"
                )
            template = self._regions.template(path)
            if template is None:
                raise NoSiteError(
                    f"{path or 'the model'} may read its {attribute} by what it holds in self.{name}, which only its "
                    f"graph can tell: {self._regions.errors[path]}"
                )
            weight = join(within(owner, path), attribute)
            if any(ops.reads(graph, weight) for graph in template.graphs):
                return [path]
        return []


def _around(owner: str, called: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns those of the called modules in which the module at `owner` is, with the paths of their callers."""
    return [(path, caller) for path, caller in called.items() if f"{owner}.".startswith(f"{path}.")]


# by their code


def _read_by_code(outer: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], list[str]]:
    """Returns the paths of the modules that read a tensor of a module inside them, by the tensor's owner and name.

    Args:
        outer: Modules with submodules, by path.
        modules: All modules, by path.
    """
    readers: dict[tuple[nn.Module, str], list[str]] = {}
    for path, module in outer.items():
        paths = _dotted_paths(class_of_forward(module))
        for owner, name in dict.fromkeys(_tensor_at(module, used) for used in paths):
            if owner is not module and has_tensor(owner, name):
                readers.setdefault((owner, name), []).append(path)
    if not readers:
        return {}
    # a module in several places is known by its first path
    places = {module: path for path, module in modules.items()}
    return {(places[owner], name): found for (owner, name), found in readers.items()}


@cached_by_class
def _dotted_paths(cls: type) -> list[list[str]]:
    """Returns the dotted paths that a forward reads or calls, each split into its names."""
    uses = _uses(cls)
    return [path.split(".") for path in (*uses.read, *uses.called) if "." in path]


def _uses(cls: Any) -> Uses:
    """Returns what a forward uses of its module; PyTorch's containers only call their submodules."""
    if cls.forward in _ONLY_CALLING and cls.__call__ is nn.Module.__call__:
        return _NOTHING
    return uses_in_forward(cls)


_ONLY_CALLING = (nn.Sequential.forward, nn.Module.forward)
_NOTHING = Uses(set(), set(), set())


def _tensor_at(module: nn.Module, path: list[str]) -> tuple[nn.Module, str]:
    """Returns the module to which a path leads, and the next name, which further names may follow, as in `weight.T`."""
    for name in path:
        inner = module._modules.get(name)
        if inner is None:
            return module, name
        module = inner
    return module, ""


def caller_of_other_methods(modules: Mapping[str, nn.Module], path: str, names: Iterable[str]) -> str | None:
    """Returns the path of a module that may call a method, other than forward, that reads tensors, or None.

    Args:
        modules: The model's modules by path.
        path: The path of the module with the method and the tensors.
        names: The names of the tensors.
    """
    cls = in_place.original_class(modules[path])
    methods = {method for name in names for method in methods_reading(cls, name)} - {"forward"}
    for around, module in modules.items() if methods else ():
        uses = uses_in_forward(class_of_forward(module))
        called = (each.rpartition(".") for each in uses.called)
        if any(method in methods and owner and _inside(module, owner) is modules[path] for owner, _, method in called):
            return around
        if not methods.isdisjoint(uses.read_elsewhere) and modules[path] in tree_of(module):
            return around
    return None


def _inside(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


class MayRead(NamedTuple):
    """What a module's code may read of its submodules, other than by a path from ``self``.

    Attributes:
        names: The names of attributes; includes `ANY` if it may be any.
        handed_on: The paths of the submodules that the code passes to other code; "" for the module itself.
        called_with_others: The paths of those that it may call with other weights than their own.
        called_in_function: The paths of those that it may call in a ``torch.autograd.Function``.
    """

    names: Set[str]
    handed_on: Set[str]
    called_with_others: Set[str] = frozenset()
    called_in_function: Set[str] = frozenset()


def _may_read(
    outer: Mapping[str, nn.Module], held: Mapping[str, Mapping[str, Any]], modules: Mapping[str, nn.Module]
) -> dict[str, MayRead]:
    """Returns what modules may read of their submodules other than by a path from ``self``, by the modules' paths.

    Args:
        outer: Modules with submodules, by path.
        held: The objects that modules hold beside modules, parameters and plain values, by path.
        modules: All modules, by path.
    """
    known: dict[tuple[Any, ...], Set[str]] = {}
    found = {}
    for path, module in outer.items():
        cls = class_of_forward(module)
        uses = _uses(cls)
        handed_on = {
            read
            for read in uses.read
            if not read or (read.partition(".")[0] in module._modules and join(path, read) in modules)
        }
        names: Set[str] = uses.read_elsewhere
        if has_hooks(module):
            names = names | read_through(module, held[path])
        elif held[path]:
            # many modules hold the same config
            of_all = tuple(map(id, held[path].values()))
            if of_all not in known:
                known[of_all] = read_through(module, held[path])
            names = names | known[of_all] if known[of_all] else names
        if handed_on:
            key = (cls, *map(id, held[path].values()))
            if key not in known:
                known[key] = read_by_what_is_given(cls, held[path].values())
            names = names | known[key]
        if "" in handed_on:
            inside = {in_place.original_class(inner) for inner in tree_of(module) if not is_of_pytorch(inner)} - {cls}
            names = names.union(*(_uses(inner).read_elsewhere - {ANY} for inner in inside))
        if names or handed_on:
            inside = handed_on - {""}
            found[path] = MayRead(
                names,
                handed_on,
                inside
                if uses.replaces_weights or (held[path] and has_functional_call(held[path].values()))
                else frozenset(),
                inside if uses.has_own_gradient else frozenset(),
            )
    return found


def _is_fast_path_disabled(module: nn.Module) -> bool:
    """Returns whether a module's code that reads weights directly, its fast path, is disabled."""
    return isinstance(module, nn.TransformerEncoderLayer) and not torch.backends.mha.get_fastpath_enabled()
