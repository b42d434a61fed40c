"""A match, for conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from graphpeft.graph.calls import calls_of
from graphpeft.graph.facts import above
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
        value = self._occurrence.values[name]
        path, present = self._reader.path(value), self._reader.constant(value)
        if path is not None and isinstance(present, PLAIN):
            self.assumed[path] = present
        return example_of(present, self._reader.read)

    def __iter__(self) -> Any:
        return iter(self._occurrence.values)

    def __len__(self) -> int:
        return len(self._occurrence.values)

    def path(self, name: str) -> str | None:
        """Returns the path in the model of the tensor or number that an argument of the pattern is, or None.

        Args:
            name: The name of the argument.
        """
        value = self._occurrence.values[name]
        return join(self.module, value.path) if isinstance(value, Attribute) else None

    def called(self, wanted: layer) -> nn.Module:
        """Returns the module that a layer of the pattern is.

        Args:
            wanted: The layer.
        """
        assert self._reader.root is not None
        return self._reader.root.get_submodule(str(self._occurrence.state.layers[wanted].target))

    def depends(self, name: str, on: str) -> bool:
        """Returns whether the value of one argument of the pattern is computed from that of another.

        Args:
            name: The name of the argument that may be computed.
            on: The name of the other one.
        """
        value, source = self._occurrence.values[name], self._occurrence.values[on]
        return isinstance(value, fx.Node) and isinstance(source, fx.Node) and source in above(value)

    @property
    def calls(self) -> tuple[str, ...]:
        """The paths of the modules in whose calls a flat graph recorded the result, the outermost first."""
        return tuple(call.path for call in calls_of(self._occurrence.result))
