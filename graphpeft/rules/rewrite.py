"""Edits graphs by rules: a rule's nodes go in behind the operation that they adapt, and come out without a trace.

A `Rule` is written as plain PyTorch code over the values of a site; `insert` runs that code on proxies, so that it
appends nodes to the graph. Every node of an adapter carries a `Tag`, so removing the adapter is erasing its nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch.fx as fx
from torch.fx.proxy import GraphAppendingTracer

from graphpeft.graph.calls import CALLS, calls_of
from graphpeft.graph.ops import Operation, Weight
from graphpeft.graph.ops.boundaries import Boundary, Leaf
from graphpeft.graph.tags import TAG, Tag, top, values_over
from graphpeft.rules.arguments import Asked
from graphpeft.rules.rule import BoundaryRule, Mergeable, changes_bias

Op = Operation | Boundary


class NoChangeError(Exception):
    """A change of a weight depends on those before it, and what an adapter does before it is none.

    Args:
        weight: The path of the weight.
        slot: The slot of the adapter before.
    """

    def __init__(self, weight: str, slot: int) -> None:
        super().__init__(f"what the adapter in slot {slot} does with {weight} is no change of it")
        self.weight, self.slot = weight, slot


def insert(graph: fx.Graph, op: Op, rule: Any, attributes: Mapping[str, str], slot: int, method: str) -> None:
    """Puts the nodes of `rule` at `op`, on top of those of other adapters.

    Args:
        graph: Edited in place.
        op: The operation, a part of `graph`.
        rule: The rule for this kind of operation.
        attributes: The paths, in the module that owns the graph, of the rule's parameters and constants, and of what
            else the site lets it read, by name.
        slot: The adapter's slot.
        method: The `peft_type` of its method.
    """
    before = set(graph.nodes)
    if isinstance(op, Leaf):
        replaced = _around_leaf(graph, op, rule, attributes)
    elif isinstance(op, Boundary):
        replaced = _at_boundary(graph, op, rule, attributes)
    else:
        replaced = _behind(graph, op, rule, attributes)
    calls = op.around if isinstance(op, Boundary) else calls_of(op.node)
    for node in [node for node in graph.nodes if node not in before]:
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
            continue
        tag = Tag(slot, method, op.name)
        if node in replaced:
            over = replaced[node].name
            tag = dataclasses.replace(tag, over=over, rule=rule, attributes=tuple(attributes.items()))
        node.meta[TAG] = tag
        node.meta[CALLS] = calls


def _behind(graph: fx.Graph, op: Operation, rule: Any, attributes: Mapping[str, str]) -> dict[fx.Node, fx.Node]:
    """Emits the operation's new value, and returns for it the node in whose place it is."""
    current = top(graph, op.node)
    before = set(graph.nodes)
    with graph.inserting_before(current.next):
        if isinstance(op, Weight):
            result = _changed(graph, rule, current, op.node, attributes)
        else:
            operands = _operands_so_far(graph, op, Asked(rule.rewrite))
            emitted = [node for node in graph.nodes if node not in before]
            nodes = {"x": op.x, "y": current, **operands}
            result = _call(rule.rewrite, graph, nodes, {"bias": None, **attributes}, {"operation": op})
            for node in [node for node in reversed(emitted) if not node.users]:
                graph.erase_node(node)
    _replace(current, result.node, before.__contains__)
    return {result.node: current}


def _changed(graph: fx.Graph, rule: Any, weight: fx.Node, base: fx.Node, attributes: Mapping[str, str]) -> fx.Proxy:
    """Emits a weight with the change that `rule` makes of it, from what it was before, and from the module's own."""
    change = _call(rule.delta, graph, {"weight": weight, "base": base}, attributes, {})
    before = fx.Proxy(weight, change.tracer)
    return before + change.to(before.dtype)


def _operands_so_far(graph: fx.Graph, op: Operation, asked: Asked) -> dict[str, fx.Node]:
    """Emits the operands of an operation for which a rule's function asks, as the adapters before it have made them.

    Raises:
        NoChangeError: If what one of these does is no change of the weight, and that is asked for.
    """
    assert not isinstance(op, Weight)
    earlier = [node.meta[TAG] for node in values_over(graph, op.node)]
    of_bias = [tag for tag in earlier if changes_bias(tag.rule)] if asked.may_be("bias") else []
    asks_for_weight = any(
        each.may_be("weight") or each.may_be("base")
        for each in (asked, *(Asked(tag.rule.bias_delta) for tag in of_bias))
    )
    found: dict[str, fx.Node] = {}
    if asks_for_weight:
        found["weight"] = found["base"] = graph.create_node("get_attr", op.weight)
    if asked.may_be("bias") and op.bias is not None:
        found["bias"] = graph.create_node("get_attr", op.bias)
    for tag in earlier:
        # the change of the bias is one beside the weight of before
        bias = _changed_bias(graph, tag, found) if tag in of_bias else None
        if asks_for_weight and not isinstance(tag.rule, Mergeable):
            raise NoChangeError(op.weight, tag.slot)
        if asks_for_weight:
            found["weight"] = _changed(graph, tag.rule, found["weight"], found["base"], dict(tag.attributes)).node
        if bias is not None:
            found["bias"] = bias.node
    return found


def _changed_bias(graph: fx.Graph, tag: Tag, operands: Mapping[str, fx.Node]) -> Any:
    """Emits the bias with the change that an adapter makes of it; None where there is neither."""
    asked = Asked(tag.rule.bias_delta)
    if "bias" in asked.needed and "bias" not in operands:
        return None  # there is none that could be scaled, or the like
    change = _call(tag.rule.bias_delta, graph, operands, {"bias": None, **dict(tag.attributes)}, {})
    if change is None or "bias" not in operands:
        return change
    return fx.Proxy(operands["bias"], change.tracer) + change


def _around_leaf(graph: fx.Graph, op: Leaf, rule: Any, attributes: Mapping[str, str]) -> dict[fx.Node, fx.Node]:
    """Emits the new value of what a call returns, and returns for it the node in whose place it is."""
    outside = {user for user in op.output.users if user not in op.inside}
    with graph.inserting_before(op.output.next):
        result = _call(rule.rewrite, graph, {"x": op.x, "y": op.output}, attributes, {"operation": op})
    _replace(op.output, result.node, outside.__contains__)
    return {result.node: op.output}


def replace(
    graph: fx.Graph,
    op: Operation | Leaf,
    function: Callable[..., Any],
    nodes: Mapping[str, fx.Node],
    paths: Mapping[str, str],
) -> None:
    """Puts what `function` returns in the place of an operation's value.

    Args:
        graph: Edited in place.
        op: The operation, of which it can ask for `x`, `y` and `operation`.
        function: Plain code, which is run on proxies.
        nodes: What else it can ask for, by name.
        paths: Attributes of the module that owns the graph, likewise.
    """
    assert not isinstance(op, Weight)
    users = set(op.node.users) - (op.inside if isinstance(op, Leaf) else set())
    with graph.inserting_before(op.node.next):
        result = _call(function, graph, {**nodes, "x": op.x, "y": op.node}, paths, {"operation": op})
    _replace(op.node, result.node, users.__contains__)


def _at_boundary(
    graph: fx.Graph, op: Boundary, rule: BoundaryRule, attributes: Mapping[str, str]
) -> dict[fx.Node, fx.Node]:
    """Emits new values of arguments and of what is returned, and returns the nodes in whose places they are."""
    tracer = GraphAppendingTracer(graph)
    inputs = {name: fx.Proxy(node, tracer) for name, node in op.inputs.items()}
    inputs |= {name: fx.Proxy(_placeholder(graph, name), tracer) for name in rule.more_inputs}
    with graph.inserting_before(next(node for node in graph.nodes if node in op.inside)):
        entered: Mapping[str, fx.Proxy] = _call(rule.enter, graph, {}, attributes, {"inputs": inputs})
    replaced = {}
    for name, new in entered.items():
        old = inputs[name].node
        _replace(old, new.node, op.inside.__contains__)
        replaced[new.node] = old
    outside = {user for user in op.output.users if user not in op.inside}
    with graph.inserting_before(op.output.next):
        given = {"output": fx.Proxy(op.output, tracer), "inputs": inputs, "entered": entered}
        left = _call(rule.leave, graph, {}, attributes, given)
    if left is not given["output"]:
        _replace(op.output, left.node, outside.__contains__)
        replaced[left.node] = op.output
    return replaced


def _replace(old: fx.Node, new: fx.Node, where: Callable[[fx.Node], bool]) -> None:
    """Lets those users of `old` for which `where` holds use `new`, and stand in its place if they stood in `old`'s."""
    for user in list(filter(where, old.users)):
        user.replace_input_with(old, new)
        if TAG in user.meta and user.meta[TAG].over == old.name:
            user.meta[TAG] = dataclasses.replace(user.meta[TAG], over=new.name)


def remove(graph: fx.Graph, slot: int) -> None:
    """Erases all nodes of the adapter in a slot from `graph`; what used their value uses the operation's own again."""
    nodes = {node.name: node for node in graph.nodes}
    for node in reversed(list(graph.nodes)):
        tag = node.meta.get(TAG)
        if tag is None or tag.slot != slot:
            continue
        if node.op == "placeholder" and node.users:
            # another adapter asks for this argument, too
            node.meta[TAG] = next(user.meta[TAG] for user in node.users if TAG in user.meta)
            node.meta[TAG] = dataclasses.replace(node.meta[TAG], over=None)
            continue
        if tag.over is not None:
            node.replace_all_uses_with(nodes[tag.over])
            for other in graph.nodes:
                if TAG in other.meta and other.meta[TAG].over == node.name:
                    other.meta[TAG] = dataclasses.replace(other.meta[TAG], over=tag.over)
        graph.erase_node(node)


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """Returns an argument that may be absent; unless it is there already, it is added behind those with names."""
    there = next((node for node in graph.nodes if node.op == "placeholder" and node.target == name), None)
    if there is not None:
        return there
    behind = next(node for node in graph.nodes if node.op != "placeholder" or str(node.target).startswith("**"))
    with graph.inserting_before(behind):
        return graph.placeholder(name, default_value=None)


def _call(
    function: Callable[..., Any],
    graph: fx.Graph,
    nodes: Mapping[str, fx.Node],
    paths: Mapping[str, str | None],
    values: Mapping[str, Any],
) -> Any:
    """Calls a rule's function with what it asks for by the names of its arguments.

    Args:
        function: The function. One that takes ``**others`` gets all that there is.
        graph: Where its nodes go.
        nodes: Nodes that it can ask for, as proxies.
        paths: Attributes of the module that owns the graph, likewise; None for one that isn't there.
        values: Other values.
    """
    tracer = GraphAppendingTracer(graph)
    paths = {"training": "training", **paths}

    def value_of(name: str) -> Any:
        if name in values:
            return values[name]
        if name in nodes:
            return fx.Proxy(nodes[name], tracer)
        path = paths[name]
        return fx.Proxy(graph.create_node("get_attr", path), tracer) if path is not None else None

    asked = Asked(function).among((*values, *nodes, *paths))
    return function(**{name: value_of(name) for name in asked})
