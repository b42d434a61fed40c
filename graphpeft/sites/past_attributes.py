"""Uses of a layer's weight that go past its attribute, where no change of an adapter is read.

A module may hold the parameter itself, or call the layer in a function with a gradient of its own.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import nn

from graphpeft._torch import FORWARD_HOOKS_OF_ALL
from graphpeft.code.contents import PLAIN
from graphpeft.code.reach import opened
from graphpeft.code.source import uses_in_forward
from graphpeft.graph.forward_classes import class_of_forward
from graphpeft.graph.holders import has_own_modules
from graphpeft.graph.kept_forwards import KNOWN, OF_HOOKS
from graphpeft.graph.paths import join
from graphpeft.peft_errors import PeftWarning

_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hooks" in name)

_NOT_HELD = (frozenset(vars(nn.Module())) - {*_HOOKS}) | OF_HOOKS | {KNOWN}
"""Attributes of every module beside its hooks, such as parameters and submodules."""

_PLAIN_TYPES = PLAIN - {nn.Parameter}
"""Types whose values hold no parameter."""

_REGISTERED = 2
"""The references to a parameter that its module alone has, when they are counted: the module's, and the count's."""


class HeldParameters:
    """The parameters that the modules of one model hold in attributes, containers, closures and hooks.

    Args:
        modules: The model's modules by path.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._places: dict[int, str] | None = None

    def place_of(self, owner: nn.Module, name: str) -> str | None:
        """Returns where a module holds a parameter of `owner`, for a person; None if none does."""
        # the search takes its time, and there is nothing to find for nearly all weights
        if sys.getrefcount(owner._parameters.get(name)) <= _REGISTERED:
            return None
        if self._places is None:
            self._places = dict(self._found())
        return self._places.get(id(owner._parameters.get(name)))

    def _found(self) -> Iterator[tuple[int, str]]:
        for path, module in self._modules.items():
            if isinstance(module, nn.RNNBase):
                continue  # what it holds is read as its attributes are, see `adapters/reads.py`
            for name, value in vars(module).items():
                if name not in _NOT_HELD and type(value) not in _PLAIN_TYPES:
                    for parameter in _parameters_in(value):
                        yield id(parameter), f"self.{name} of {path or 'the model'}"
        for hooks in FORWARD_HOOKS_OF_ALL:
            for parameter in _parameters_in(dict(hooks)):
                yield id(parameter), "a hook of all modules"


def _parameters_in(start: Any) -> Iterator[nn.Parameter]:
    """Yields the parameters that a value leads to otherwise than by a module."""
    waiting, seen = [start], dict[int, Any]()
    while waiting:
        value = waiting.pop()
        kind = type(value)  # isinstance would read __class__, which a user's object may compute
        if issubclass(kind, nn.Parameter):
            yield value
        elif id(value) not in seen and not issubclass(kind, torch.Tensor | type | nn.Module):
            seen[id(value)] = value
            waiting += [part for part in opened(value)[1] if type(part) not in _PLAIN_TYPES]


class CalledInFunctions:
    """The modules of one model that its code may call in a function with a gradient of its own.

    Args:
        modules: The modules by path.
        graphs: The paths of those that are graphs, and have no code of the user's.
    """

    def __init__(self, modules: Mapping[str, nn.Module], graphs: Set[str]) -> None:
        self._modules, self._graphs = modules, graphs

    @functools.cached_property
    def _found(self) -> dict[str, str]:
        """The paths of the modules that are called so, each with its caller's."""
        found: dict[str, str] = {}
        for path, module in self._modules.items():
            # PyTorch's own modules call no function of a user's
            is_of_pytorch = type(module).__module__.startswith("torch.nn.modules.")
            if is_of_pytorch or path in self._graphs or not has_own_modules(module):
                continue
            uses = uses_in_forward(class_of_forward(module))
            for read in uses.read if uses.has_own_gradient else ():
                if read.partition(".")[0] in module._modules:
                    found[join(path, read)] = path
        return found

    def warn(self, owner: str) -> None:
        """Warns once of each module around a weight that code may call so, since adapters may get no gradient there.

        Args:
            owner: The path of the module that owns the weight.
        """
        for around in _around(owner) if self._found else ():
            caller = self._found.pop(around, None)
            if caller is not None:
                warnings.warn(
                    f"{caller or 'the model'} may call {around} in a torch.autograd.Function. Its backward runs only "
                    "if an input requires a gradient, and adapters inside get none without it: let inputs require "
                    "gradients, as enable_input_require_grads() does; check_learning(model, batch) tells what learns",
                    PeftWarning,
                    stacklevel=2,
                )


def _around(path: str) -> list[str]:
    """Returns a path and those of the modules around it, the model's aside."""
    names = path.split(".")
    return [".".join(names[:depth]) for depth in range(len(names), 0, -1)]
