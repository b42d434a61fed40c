"""Parameters that a module holds beside its attribute of that name, where no change of an adapter is read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from graphpeft._torch import FORWARD_HOOKS_OF_ALL
from graphpeft.code.contents import PLAIN
from graphpeft.code.reach import opened
from graphpeft.graph.kept_forwards import KNOWN, OF_HOOKS

_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hooks" in name)

_NOT_HELD = (frozenset(vars(nn.Module())) - {*_HOOKS}) | OF_HOOKS | {KNOWN}
"""Attributes of every module beside its hooks, such as parameters and submodules."""

_PLAIN_TYPES = PLAIN - {nn.Parameter}
"""Types whose values hold no parameter."""

_REGISTERED = 2
"""The references to a parameter that its module alone has, when they are counted: the module's, and the count's."""


class HeldParameters:
    """The parameters that the modules of one model hold in attributes, containers, closures and hooks."""

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
