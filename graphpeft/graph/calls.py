"""The module calls in which a node of a flat graph was recorded.

A trace inlines the calls of modules. Each node keeps its calls, so the inputs, the outputs and the nodes of each call
stay known.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from graphpeft._torch import pytree

CALLS = "graphpeft_calls"
"""The key of ``node.meta`` under which a node keeps its calls, outermost first."""


@dataclass(eq=False)
class Call:
    """A call of a module whose own code was inlined.

    Attributes:
        path: The path of the module.
        name: A name that no other call in the graph has.
        arguments: The node's name of each argument, by the argument's name; None for a value that is no node.
        returned: The node's name of each returned value, flattened by pytree; None for a value that is no node.
    """

    path: str
    name: str
    arguments: Mapping[str, str | None]
    returned: tuple[str | None, ...] = ()

    @classmethod
    def of(cls, path: str, number: int, forward: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Call:
        """Returns a call of `forward` that has not returned yet."""
        try:
            given = inspect.signature(forward).bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # a decorator accepts arguments that the signature doesn't show
        name = f"({path})" if number == 0 else f"({path}, call {number + 1})"
        return cls(path, name, {argument: _node_name(value) for argument, value in given.items()})

    def returns(self, value: Any) -> None:
        """Records the value that the call returned."""
        self.returned = tuple(_node_name(leaf) for leaf in pytree.tree_leaves(value))


def _node_name(value: Any) -> str | None:
    return value.node.name if isinstance(value, fx.Proxy) else None


def calls_of(node: fx.Node) -> tuple[Call, ...]:
    """Returns the calls in which `node` was recorded, outermost first."""
    return node.meta.get(CALLS, ())
