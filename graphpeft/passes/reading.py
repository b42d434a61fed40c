"""What passes read of an adapted graph."""

from __future__ import annotations

from torch import fx

from graphpeft import ops
from graphpeft.tags import TAG


def adapted_values(graph: fx.Graph) -> list[fx.Node]:
    """Returns the nodes of adapters that stand in the place of an operation's value, in the order of the graph."""
    return [node for node in graph.nodes if TAG in node.meta and node.meta[TAG].over is not None]


def is_read_by(value: fx.Node, reader: fx.Node) -> bool:
    """Tells whether `reader` alone uses the elements of a value; others may ask for its dtype and the like."""
    return all(user is reader or ops.only_asks(user) for user in value.users)


def put_in_place_of(old: fx.Node, new: fx.Node) -> None:
    """Lets all that used `old` use `new`, which is marked as `old` was, and erases what is needed no more."""
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    erase_unused(old)


def erase_unused(node: fx.Node) -> None:
    """Erases a node without users, and then what it alone used."""
    if node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        if TAG in source.meta:
            erase_unused(source)
