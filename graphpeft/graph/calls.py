"""Which calls of modules a node of a flat graph comes from.

A trace puts the calls of modules that it inlines one into the other. Each node keeps the calls in which it was
recorded, so that what a call was given, what it returned, and what lies between can still be told.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from graphpeft._torch import pytree

CALLS = "graphpeft_calls"
"""The key of ``node.meta`` under which a node keeps its calls, the outermost first."""


@dataclass(eq=False)
class Call:
    """A call of a module whose own code was inlined.

    Attributes:
        path: The path of the module.
        name: What tells it from all other calls in the graph.
        arguments: The names of its forward's arguments, with the name of the node that each was, if it was one.
        returned: The same for what it returned: one name for each value in its containers.
    """

    path: str
    name: str
    arguments: Mapping[str, str | None]
    returned: tuple[str | None, ...] = ()

    @classmethod
    def of(cls, path: str, number: int, forward: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Call:
        """Returns the call of `forward` with these arguments, before it has returned.

        Args:
            path: The path of its module.
            number: How often the module was called before.
            forward: The module's forward.
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        try:
            given = inspect.signature(forward).bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # a decorator takes more than the signature says
        name = f"({path})" if number == 0 else f"({path}, call {number + 1})"
        return cls(path, name, {argument: _node_name(value) for argument, value in given.items()})

    def returns(self, value: Any) -> None:
        """Notes what the call returned."""
        self.returned = tuple(_node_name(leaf) for leaf in pytree.tree_leaves(value))


def _node_name(value: Any) -> str | None:
    return value.node.name if isinstance(value, fx.Proxy) else None


def calls_of(node: fx.Node) -> tuple[Call, ...]:
    """Returns the calls in which `node` was recorded, the outermost first."""
    return node.meta.get(CALLS, ())
