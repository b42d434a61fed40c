"""A match, for conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from graphpeft.graph.paths import join
from graphpeft.rewrites.matching import Occurrence
from graphpeft.rewrites.pattern import layer
from graphpeft.rewrites.reading import Reader
from graphpeft.rewrites.values import PLAIN, Attribute, example_of


class Match(Mapping[str, Any]):
    """A place where a pattern is met, for the conditions of a rewrite.

    It maps the names of the pattern's arguments to their values: to a tensor or a number that a module holds, to a
    constant, or to an example of a value that the graph computes, which has a shape and a dtype and no data. Without
    `example_inputs`, that may be None.

    Attributes:
        module: The path of the module in whose forward it is; "" for the model.
        training: Whether it is in the graph of training mode.
        assumed: The numbers and flags of modules that were read here, by path; each run checks that they are the same.

    Examples:
        >>> wide = lambda match: None if match["w"].shape[0] > 4 else "it is narrow"
        >>> rewrite = Rewrite(lambda x, w, b: F.linear(x, w, b), lambda x, w, b: F.linear(x, w, b), where=wide)
        >>> [matched.module for matched in rewrite.find(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 8)])).matches]
        ['1']
    """

    def __init__(self, occurrence: Occurrence, reader: Reader, module: str) -> None:
        self._occurrence, self._reader = occurrence, reader
        self.module, self.training = module, reader.training
        self.assumed: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """Returns the value of an argument of the pattern."""
        value = self._value(name)
        path, present = self._reader.path(value), self._reader.constant(value)
        if path is not None and isinstance(present, PLAIN):
            self.assumed[path] = present
        return example_of(present, self._reader.read)

    def _value(self, name: str) -> Any:
        values = self._occurrence.values
        if name not in values:
            raise KeyError(f"the pattern has no argument {name}; its arguments are {', '.join(values)}")
        return values[name]

    def __iter__(self) -> Any:
        return iter(self._occurrence.values)

    def __len__(self) -> int:
        return len(self._occurrence.values)

    def path(self, name: str) -> str | None:
        """Returns the path in the model of the value of an argument.

        Args:
            name: The name of the argument.

        Returns:
            The path of a tensor or a number that a module holds; None for any other value.

        Raises:
            KeyError: If the pattern has no such argument.
        """
        value = self._value(name)
        return join(self.module, value.path) if isinstance(value, Attribute) else None

    def called(self, wanted: layer) -> nn.Module:
        """Returns the module that a layer of the pattern stands for.

        Args:
            wanted: The layer.

        Returns:
            The module of the model.

        Raises:
            KeyError: If the pattern doesn't call this layer.
        """
        if wanted not in self._occurrence.state.layers:
            raise KeyError(f"the pattern doesn't call this layer({wanted.__name__})")
        assert self._reader.root is not None
        return self._reader.root.get_submodule(str(self._occurrence.state.layers[wanted].target))
