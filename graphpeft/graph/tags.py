"""Marks nodes of a graph as an adapter's, so that taking the adapter off is erasing its nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx

TAG = "graphpeft"
"""The key of ``node.meta`` under which a node of an adapter carries its `Tag`."""


@dataclass(frozen=True)
class Tag:
    """Whose a node is.

    Attributes:
        slot: The slot of the adapter, see `graph/slots.py`.
        method: The method's `peft_type`.
        site: The name of the adapted operation.
        over: On a node that stands in the place of another, the name of that one; else None.
        rule: On such a node, the rule that has made it.
        attributes: On such a node, the attributes that the rule reads, by its names for them.
    """

    slot: int
    method: str
    site: str
    over: str | None = None
    rule: Any = None
    attributes: tuple[tuple[str, str], ...] = ()


def top(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Returns what stands in the place of an operation's `node` after all adapters of it, or `node` itself."""
    return [node, *values_over(graph, node)][-1]


def values_over(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Returns what stands in the place of an operation's `node` after each adapter of it, in their order."""
    tags = ((other, other.meta[TAG]) for other in graph.nodes if TAG in other.meta)
    by_name = {tag.over: other for other, tag in tags if tag.over and tag.site == node.name}
    found = []
    while node.name in by_name:
        node = by_name[node.name]
        found.append(node)
    return found
