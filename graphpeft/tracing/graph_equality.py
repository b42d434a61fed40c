"""Compares what two graphs compute, by the expressions of their outputs: node names and order don't matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping

import torch.fx as fx
from torch.fx.node import map_arg

from graphpeft.graph import guards
from graphpeft.graph.dependencies import writes


def equivalent(graph: fx.Graph, other: fx.Graph, equal_nodes: Mapping[fx.Node, fx.Node]) -> bool:
    """Returns whether `other` returns the same outputs as `graph` and has the same in-place writes.

    `other` may lack writes into tensors that `graph` creates, since such a tensor may exist in `other` already.
    """
    known: dict[fx.Node, Hashable] = {}
    numbers: dict[Hashable, int] = {}
    for node in graph.nodes:
        known[node] = _expression(node, known, numbers)
    for node in other.nodes:
        known[node] = known[equal_nodes[node]] if node in equal_nodes else _expression(node, known, numbers)
    if known[graph.output_node()] != known[other.output_node()]:
        return False
    first, second = ([node for node in of.nodes if _is_effect(node)] for of in (graph, other))
    lacking = Counter(known[node] for node in first) - Counter(known[node] for node in second)
    more = Counter(known[node] for node in second) - Counter(known[node] for node in first)
    return not more and all(_writes_into_new_tensor(node) for node in first if known[node] in lacking)


def checks_all_of(graph: fx.Graph, other: fx.Graph, but: Callable[[fx.Node], bool]) -> bool:
    """Returns whether `graph` has all checks of `other`, except checks for which `but` returns True."""
    numbers: dict[Hashable, int] = {}
    first, second = (_checks(each, numbers, but) for each in (graph, other))
    return second <= first


def _checks(graph: fx.Graph, numbers: dict[Hashable, int], but: Callable[[fx.Node], bool]) -> set[Hashable]:
    known: dict[fx.Node, Hashable] = {}
    found: set[Hashable] = set()
    for node in graph.nodes:
        known[node] = _expression(node, known, numbers)
        if node.target in guards.CHECKS and not but(node):
            found.add(known[node])
        elif node.target is guards.expect_each:
            values, expected, _ = node.args
            found |= {(known[value], repr(answer)) for value, answer in zip(values, expected, strict=True)}
    return found


def _expression(node: fx.Node, known: Mapping[fx.Node, Hashable], numbers: dict[Hashable, int]) -> Hashable:
    inputs = tuple(known[source] for source in _nodes_in((node.args, node.kwargs)))
    shape = map_arg((node.args, node.kwargs), lambda _: None)
    shown = (node.op, str(node.target), repr(shape), inputs)
    # a number keeps expressions small, which would nest all of their inputs otherwise
    return numbers.setdefault(shown, len(numbers))


def _nodes_in(arguments: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(arguments, found.append)  # type: ignore[arg-type]
    return found


def _is_effect(node: fx.Node) -> bool:
    is_call = node.op.startswith("call_")
    return is_call and node.target not in guards.CHECKS and writes(node.target)


def _writes_into_new_tensor(node: fx.Node) -> bool:
    """Returns whether a write changes a tensor that the graph creates, rather than an argument or a module's tensor."""
    written = node.args[0] if node.args else None
    while isinstance(written, fx.Node) and written.op in ("call_function", "call_method") and written.args:
        source = written.args[0]
        if not isinstance(source, fx.Node) or not (writes(written.target) or _is_view(written)):
            return True
        written = source
    return isinstance(written, fx.Node) and written.op in ("call_function", "call_method")


def _is_view(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("getitem", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "select", "getattr")
