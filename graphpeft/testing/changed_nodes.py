"""Counts the nodes that a rewrite removes, adds and edits, by the nodes' names."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx, nn
from torch.fx.node import map_arg

from graphpeft.testing.first_difference import graph_of
from graphpeft.wording import joined, number_of

Nodes = dict[tuple[str, str], fx.Node]
"""Nodes by the path of the module whose graph has them, and by their names."""


class ChangedNodes(NamedTuple):
    """The nodes that a rewrite has changed, by path and name.

    Attributes:
        removed: Nodes that only the model has.
        added: Nodes that only the rewritten model has.
        edited: Nodes of both whose operation or arguments differ. A user of a removed node that reads the node's
            replacement is not edited, and neither is one that reads an added node in front of it.
    """

    removed: tuple[str, ...]
    added: tuple[str, ...]
    edited: tuple[str, ...]

    @property
    def number(self) -> int:
        """The number of all of them."""
        return sum(map(len, self))

    def __str__(self) -> str:
        if not self.number:
            return "no node"
        kinds = zip(("removed", "added", "edited"), self, strict=True)
        parts = [f"{len(names)} {kind} ({joined(names)})" for kind, names in kinds if names]
        return f"{number_of(self.number, 'node')}: {', '.join(parts)}"


def nodes_of(model: nn.Module) -> Nodes:
    """Returns the nodes of all graphs in a model, also those of graph modules inside."""
    graphs = {path: graph_of(module) for path, module in model.named_modules()}
    return {(path, node.name): node for path, graph in graphs.items() if graph is not None for node in graph.nodes}


def changed_nodes(before: Nodes, after: Nodes) -> ChangedNodes:
    """Compares the nodes of a model with those of the rewritten model."""
    return ChangedNodes(
        tuple(_label(*key) for key in before if key not in after),
        tuple(_label(*key) for key in after if key not in before),
        tuple(_label(*key) for key in before if key in after and _is_edited(key, before, after)),
    )


def _is_edited(key: tuple[str, str], before: Nodes, after: Nodes) -> bool:
    old, new = before[key], after[key]
    (old_form, old_inputs), (new_form, new_inputs) = _parts(old), _parts(new)
    if (old.op, old.target, old_form) != (new.op, new.target, new_form):
        return True
    return any(
        a.name != b.name and (key[0], a.name) in after and (key[0], b.name) in before
        for a, b in zip(old_inputs, new_inputs, strict=True)
    )


def _parts(node: fx.Node) -> tuple[Any, list[fx.Node]]:
    """Returns a node's arguments with a mark in the place of each node, and these nodes in their order."""
    inputs: list[fx.Node] = []

    def mark(argument: fx.Node) -> Any:
        inputs.append(argument)
        return ...

    return map_arg((node.args, dict(node.kwargs)), mark), inputs


def _label(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
