"""Marks nodes of a graph as an adapter's, so that taking the adapter off is erasing its nodes."""

from __future__ import annotations

import dataclasses
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
        over: On a node that stands in the place of the operation's value, the name of the node before it; else None.
        enters_for: On a node that the operation is given in the place of its input, the name of that one; else None.
        rule: On such nodes, the rule that has made them.
        attributes: On such nodes, the attributes that the rule reads, by its names for them.
        is_change: On such nodes, whether what the rule does is a change of the operation's weight.
        place: On such nodes, the adapter's place in the order in which adapters change the operation, from 1.
    """

    slot: int
    method: str
    site: str
    over: str | None = None
    enters_for: str | None = None
    rule: Any = None
    attributes: tuple[tuple[str, str], ...] = ()
    place: int = 0
    is_change: bool = True

    @property
    def stands_for(self) -> str | None:
        """On a node that stands in the place of another one, on either side of the operation, the name of that one."""
        return self.over if self.over is not None else self.enters_for

    def standing_for(self, name: str) -> Tag:
        """Returns the tag of a node that stands in the place of another one now."""
        field = "over" if self.over is not None else "enters_for"
        return dataclasses.replace(self, **{field: name})


def top(graph: fx.Graph, node: fx.Node, site: str) -> fx.Node:
    """Returns what stands in the place of the value of the operation `site` after all its adapters, or `node` itself.

    Args:
        graph: The graph.
        node: The operation's own value.
        site: The operation's name.
    """
    tags = ((other, other.meta[TAG]) for other in graph.nodes if TAG in other.meta)
    by_name = {tag.over: other for other, tag in tags if tag.over and tag.site == site}
    while node.name in by_name:
        node = by_name[node.name]
    return node


def changes_at(graph: fx.Graph, site: str) -> list[Tag]:
    """Returns the tag of each adapter that changes an operation, in the order in which they do."""
    tags = (node.meta[TAG] for node in graph.nodes if TAG in node.meta)
    by_place = {tag.place: tag for tag in tags if tag.site == site and tag.place}
    return [by_place[place] for place in sorted(by_place)]


def own_input(graph: fx.Graph, site: str, x: fx.Node) -> fx.Node:
    """Returns the input that an operation has without adapters, from the one that it is given."""
    while TAG in x.meta and x.meta[TAG].site == site and x.meta[TAG].enters_for is not None:
        name = x.meta[TAG].enters_for
        x = next(node for node in graph.nodes if node.name == name)
    return x
