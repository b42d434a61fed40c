"""Tags that mark a graph's nodes as an adapter's, so that removing the adapter means erasing its nodes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

TAG = "graphpeft"
"""The key of ``node.meta`` under which an adapter's node has its `Tag`."""

REWRITE = "graphpeft_rewrite"
"""The key of ``node.meta`` for the name of the rewrite that made a node; nobody takes such nodes out one by one."""


@dataclass(frozen=True)
class Tag:
    """The adapter that a node belongs to, and the node's role in it.

    Attributes:
        slot: The slot of the adapter, see `graph/slots.py`.
        method: The method's `peft_type`.
        site: The name of the adapted operation.
        over: The node that this node replaces as the operation's value, by name; None if it replaces none.
        enters_for: The node that this node replaces as the operation's input, by name; None if it replaces none.
        rule: On replacing nodes, the rule that made them.
        attributes: On replacing nodes, the attributes that the rule reads, by the rule's names for them.
        is_change: On replacing nodes, whether the rule changes the operation's weight.
        place: On replacing nodes, the adapter's place, from 1, in the order in which adapters change the operation.
        weight: On replacing nodes, the path of the operation's weight; "" without one.
        bias: On replacing nodes, the path of the bias that the operation adds and the rule changes, or None.
        of_one_call: On replacing nodes, whether the adapter acts in one of the weight's operations alone.
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
    weight: str = ""
    bias: str | None = None
    of_one_call: bool = False

    @property
    def stands_for(self) -> str | None:
        """The name of the node that this node replaces, on either side of the operation; None if it replaces none."""
        return self.over if self.over is not None else self.enters_for

    def standing_for(self, name: str) -> Tag:
        """Returns the tag with `name` as the replaced node."""
        field = "over" if self.over is not None else "enters_for"
        return dataclasses.replace(self, **{field: name})


def top(graph: fx.Graph, node: fx.Node, site: str) -> fx.Node:
    """Returns the node that has the value of the operation `site` after all its adapters; without any, `node`."""
    tags = ((other, other.meta[TAG]) for other in graph.nodes if TAG in other.meta)
    by_name = {tag.over: other for other, tag in tags if tag.over and tag.site == site}
    while node.name in by_name:
        node = by_name[node.name]
    return node


def changes_at(graph: fx.Graph, site: str) -> list[Tag]:
    """Returns one tag of each adapter that changes an operation, in the order of the changes."""
    tags = [node.meta[TAG] for node in graph.nodes if TAG in node.meta]
    by_place = {tag.place: tag for tag in tags if tag.site == site and tag.place}
    return [by_place[place] for place in sorted(by_place)]


def own_input(graph: fx.Graph, site: str, x: fx.Node) -> fx.Node:
    """Returns the input that an operation would have without adapters, given its present input `x`."""
    while TAG in x.meta and x.meta[TAG].site == site and x.meta[TAG].enters_for is not None:
        name = x.meta[TAG].enters_for
        x = next(node for node in graph.nodes if node.name == name)
    return x


def read_before(node: fx.Node) -> list[fx.Node]:
    """Returns an operand of an operation as it is, and as it was before each adapter that has changed it, in turn."""
    found = [node]
    while TAG in node.meta and node.meta[TAG].enters_for is not None:
        name = node.meta[TAG].enters_for
        node = next(other for other in node.graph.nodes if other.name == name)
        found.append(node)
    return found
