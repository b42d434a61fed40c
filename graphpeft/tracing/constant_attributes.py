"""Decides which attributes of modules that a forward has read become constants of its graph: its settings.

A number with which tensors are computed is read by a node of its own, so that the graph follows it. All other plain
attributes, such as the number of an attention's heads, are settings.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
import torch.fx as fx
from torch.fx.node import map_arg

from graphpeft.graph import guards
from graphpeft.graph.drawing_functions import draws
from graphpeft.graph.facts import IN_PLACE, above, is_random, writes
from graphpeft.graph.settings import Reads, Setting
from graphpeft.graph.template import VALUE
from graphpeft.tracing.attributes import is_plain

_ARITHMETIC = frozenset((
    *(getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "pow", *IN_PLACE)),
    torch.add, torch.sub, torch.mul, torch.div, torch.pow,
    "add", "sub", "mul", "div", "pow", "add_", "sub_", "mul_", "div_", "pow_",
))  # fmt: skip
"""What computes with whole numbers. Elsewhere they are sizes, indices or flags."""

_GUARDS = (guards.expect, guards.expect_present)


def make_settings(graph: fx.Graph, lines: Mapping[str, str]) -> Reads:
    """Makes constants of attributes on which a graph decides, and of those that are sizes, indices or flags.

    Args:
        graph: The graph, which is edited.
        lines: Where plain attributes were read, by their paths.
    """
    read = [node for node in graph.nodes if node.op == "get_attr" and node.target in lines]
    derived = _derived_from(graph, read)
    decided: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.target is guards.expect and node.args[0] in derived:
            decided |= {source: str(node.args[2]) for source in above(node.args[0]) if source not in decided}
    settings = {node: decided.get(node, lines[str(node.target)]) for node in read if node in decided or _is_fixed(node)}
    _make_constants(derived, set(settings))
    # what a module has read that stays a call in the end may be read again
    by_path = {str(node.target): Setting(str(node.target), node.meta[VALUE], line) for node, line in settings.items()}
    numbers = dict.fromkeys(str(node.target) for node in read if node not in settings)
    return Reads(tuple(by_path.values()), tuple(numbers))


def _derived_from(graph: fx.Graph, read: list[fx.Node]) -> dict[fx.Node, None]:
    """Returns these nodes, and those that are computed from nothing else and are plain themselves, in order."""
    derived = dict.fromkeys(read)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node in derived or not node.op.startswith("call_") or node.op == "call_module" or not inputs:
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.target in _GUARDS or writes(node.target) or is_random(name) or draws(node.target):
            continue
        if all(source in derived for source in inputs) and VALUE in node.meta and is_plain(node.meta[VALUE]):
            derived[node] = None
    return derived


def _is_fixed(node: fx.Node) -> bool:
    """Returns whether an attribute is more than a number with which tensors are computed."""
    if type(node.meta[VALUE]) is not int:
        return type(node.meta[VALUE]) is not float
    is_factor = (user.target in _ARITHMETIC and isinstance(user.meta.get(VALUE), torch.Tensor) for user in node.users)
    return not node.users or not all(is_factor)


def _make_constants(derived: dict[fx.Node, None], fixed: set[fx.Node]) -> None:
    for node in derived:
        if node.op != "get_attr" and all(source in fixed for source in node.all_input_nodes):
            fixed.add(node)
    for user in dict.fromkeys(user for node in fixed for user in node.users):
        user.args, user.kwargs = map_arg(
            (user.args, user.kwargs), lambda used: used.meta[VALUE] if used in fixed else used
        )
        if user.target in _GUARDS and not isinstance(user.args[0], fx.Node):
            user.graph.erase_node(user)
    for node in reversed(derived):
        if not node.users:
            node.graph.erase_node(node)
