"""Edits graphs by rules: inserts a rule's nodes at the operation that they adapt, and removes them completely.

A `Rule` is plain PyTorch code over the values of a site. `insert` runs that code on proxies, so that it appends nodes
to the graph. Every node of an adapter has a `Tag`, so removing the adapter means erasing its nodes.

A change is of the weight that earlier adapters have made, which DoRA multiplies, as in PEFT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.fx.node import map_arg

from graphpeft.graph.call_inputs import CallInput
from graphpeft.graph.calls import CALLS, calls_of
from graphpeft.graph.changed_products import is_apart
from graphpeft.graph.ops import Computation, Operation, Weight
from graphpeft.graph.ops.boundaries import Boundary, Leaf
from graphpeft.graph.ops.patched import as_patched
from graphpeft.graph.own_tensors import let_read_own
from graphpeft.graph.recorded import as_node
from graphpeft.graph.tags import TAG, Tag, changes_at, own_input, read_before, top
from graphpeft.rules.arguments import OPTIONAL, Asked, asked_by
from graphpeft.rules.code_in_graphs import RuleError, RuleTracer, given_to
from graphpeft.rules.delta_rule import DeltaRule
from graphpeft.rules.rule import BoundaryRule, InputRule, OperationRule, changes_bias

Op = Operation | Boundary
Operand = Computation | Leaf
"""An operation with an input."""


class NoChangeError(Exception):
    """A rule asks for the present weight, but an earlier adapter's effect there is no change of the weight."""

    def __init__(self, weight: str, slot: int) -> None:
        super().__init__(f"what the adapter in slot {slot} does with {weight} is no change of it")
        self.weight, self.slot = weight, slot


class ChangedInputError(Exception):
    """A rule asks for an argument of a forward as it was given, and an earlier adapter changes it."""

    def __init__(self, argument: str, slot: int) -> None:
        super().__init__(f"the adapter in slot {slot} changes {argument}")
        self.argument, self.slot = argument, slot


def insert(
    graph: fx.Graph,
    op: Op,
    rule: Any,
    attributes: Mapping[str, str],
    slot: int,
    method: str,
    is_change: bool = True,
    of_one_call: bool = False,
) -> None:
    """Inserts the nodes of `rule` at `op`, after the nodes of other adapters."""
    before = set(graph.nodes)
    with torch.enable_grad():  # whatever the caller's mode is, the rule's code alone may choose another
        entered, replaced = _emit(
            graph, op, rule, {**attributes, **{name: CallInput(name) for name in rule.call_inputs}}
        )
    of_weight = {} if isinstance(op, Boundary) else _reading_own(graph, op, changes_bias(rule), before)
    calls = op.around if isinstance(op, Boundary) else calls_of(op.node)
    place = max((tag.place for tag in changes_at(graph, op.name)), default=0) + 1
    for node in [node for node in graph.nodes if node not in before]:
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
            continue
        tag = Tag(slot, method, op.name)
        if node in replaced or node in entered:
            of_node = {"rule": rule, "attributes": tuple(attributes.items()), "place": place, "is_change": is_change}
            of_node |= {"of_one_call": of_one_call, **of_weight}
            over, enters_for = (nodes[node].name if node in nodes else None for nodes in (replaced, entered))
            tag = dataclasses.replace(tag, over=over, enters_for=enters_for, **of_node)
        node.meta[TAG] = tag
        node.meta[CALLS] = calls


def _reading_own(graph: fx.Graph, op: Operation, changes_bias: bool, before: Collection[fx.Node]) -> dict[str, Any]:
    """Lets a graph read an operation's own tensors, and returns the paths of those that other readers get changed."""
    bias = None if isinstance(op, Weight) else op.bias
    changed = (op.weight, bias) if changes_bias else (op.weight,)
    for node in graph.nodes:
        if node.op == "get_attr" and (node.target in changed or (node.target == bias and node not in before)):
            let_read_own(node)
    return {"weight": op.weight, "bias": bias if changes_bias else None}


Sources = Mapping[str, str | CallInput]
"""The sources of a rule's values, by name: paths in the module that owns the graph, and arguments of the call."""

Replaced = dict[fx.Node, fx.Node]
"""New nodes, each with the node that it replaces."""


def _emit(graph: fx.Graph, op: Op, rule: Any, attributes: Sources) -> tuple[Replaced, Replaced]:
    """Emits a rule's nodes, and returns the new inputs and the new values, each with the node that it replaces."""
    if isinstance(op, Boundary) and not isinstance(op, Leaf):
        return {}, _at_boundary(graph, op, rule, attributes)
    if isinstance(op, Weight):
        return {}, _over_weight(graph, op, rule, attributes)
    x = own_input(graph, op.name, op.x)
    entered, replaced = {}, {}
    if isinstance(rule, InputRule):
        entered = _before(graph, op, rule, x, attributes)
        x = next(iter(entered))
    if isinstance(rule, OperationRule):
        if isinstance(op, Leaf):
            replaced = _around_leaf(graph, op, rule, x, attributes)
        else:
            into_weight, replaced = _behind(graph, op, rule, x, attributes)
            entered |= into_weight
    return entered, replaced


def _before(graph: fx.Graph, op: Operand, rule: InputRule, x: fx.Node, attributes: Sources) -> Replaced:
    """Emits the new input of an operation and of the earlier adapters there."""
    inside = op.inside if isinstance(op, Leaf) else {op.node}
    users = [user for user in x.users if user in inside or (TAG in user.meta and user.meta[TAG].site == op.name)]
    if not isinstance(op, Leaf) and _times_read(op.node, x) > 1:
        raise RuleError(f"{x.name} is more than the input of {op.name}, so it can't be changed as that alone")
    # before the first node of a call, and before earlier adapters' nodes at its boundary
    first = next(node for node in graph.nodes if node in users or node in inside)
    with graph.inserting_before(first):
        value = _call(rule.enter, RuleTracer(graph), {"x": x}, attributes, {"operation": op})
        _refuse_no_value(value, "enter")
        new = value.node
    _replace(x, new, set(users).__contains__)
    return {new: x}


def _refuse_no_value(value: Any, function: str) -> None:
    if not isinstance(value, fx.Proxy):
        raise RuleError(f"{function} returns a {type(value).__name__}, and no value that it computed")


def _times_read(node: fx.Node, x: fx.Node) -> int:
    """Returns how often `x` occurs in the arguments of a node."""
    read: list[fx.Node] = []
    map_arg((node.args, node.kwargs), read.append)
    return read.count(x)


def _over_weight(graph: fx.Graph, op: Weight, rule: Any, attributes: Sources) -> Replaced:
    """Emits the new value of a weight, and returns it with the node that it replaces."""
    current = top(graph, op.node, op.name)
    before = set(graph.nodes)
    with graph.inserting_before(current.next):
        nodes = {"weight": current, "base": op.node}
        tracer = RuleTracer(graph)
        given = given_to(rule.delta, tracer, nodes, attributes, {})
        emitted_before = set(graph.nodes)
        called = given_to(rule.changed_weight, tracer, nodes, attributes, {"given": given})
        result = rule.changed_weight(**called).node
        _erase_unread([node for node in graph.nodes if node not in emitted_before and node is not result])
    _replace(current, result, before.__contains__)
    return {result: current}


def _behind(graph: fx.Graph, op: Computation, rule: Any, x: fx.Node, attributes: Sources) -> tuple[Replaced, Replaced]:
    """Emits the operation's new weight, if it gets one, and its new value; returns each with what it replaces."""
    current, tracer = top(graph, op.node, op.name), RuleTracer(graph)
    weight = _own_weight(graph, op, rule)
    before, behind = set(graph.nodes), current.next
    entered: Replaced = {}
    with graph.inserting_before(behind if weight is None else op.node):
        operands = _operands(graph, op, rule, attributes)
        if weight is not None:
            apart = as_node(is_apart, *(fx.Proxy(node, tracer) for node in (x, weight))).node
            operands["apart"] = _call(rule.keeps_apart, tracer, {"apart": apart}, attributes, {}).node
            entered = {_call(rule.added, tracer, {**operands, "weight": weight}, attributes, {}).node: weight}
    with graph.inserting_before(behind):
        if "plain" in asked_by(rule.rewrite).names:
            operands["plain"] = _plain(graph, op, x)
        emitted = [node for node in graph.nodes if node not in before]
        none = {name: None for name in OPTIONAL if name in asked_by(rule.rewrite).names and name not in operands}
        nodes = {"x": x, "y": current, **operands}
        result = _call(
            rule.rewrite, tracer, nodes, {"bias": None, "base_bias": None, **attributes}, {"operation": op, **none}
        )
        _refuse_no_value(result, "rewrite")
        for new, old in entered.items():
            _replace(old, new, {op.node}.__contains__)
        _erase_unread(emitted)
    _replace(current, result.node, before.__contains__)
    return entered, {result.node: current}


def _own_weight(graph: fx.Graph, op: Computation, rule: Any) -> fx.Node | None:
    """Returns the operand of an operation to which a rule's change is to be added, or None."""
    if not isinstance(rule, DeltaRule) or "apart" not in asked_by(rule.rewrite).names:
        return None
    # a layer's call has no such operand, and a layer's patched forward reads its input alone
    if not op.node.op.startswith("call_") or op.node.op == "call_module" or op.node.target is as_patched:
        return None
    operands = [node for node in op.node.all_input_nodes if _reads(node, op.weight)]
    if len(operands) != 1 or op.x in operands or not rule.adds_to_weight(op):
        return None
    # what an earlier adapter does to the input, or to the result, is no matter of this change
    added = len(read_before(operands[0])) - 1
    return operands[0] if added == len(changes_at(graph, op.name)) else None


def _reads(node: fx.Node, path: str) -> bool:
    *_, first = read_before(node)
    return first.op == "get_attr" and first.target == path


def _erase_unread(nodes: list[fx.Node]) -> None:
    """Erases what nothing reads, such as a change that a rule doesn't need here, with all that it is made of."""
    for node in reversed(nodes):
        if not node.users:
            node.graph.erase_node(node)


def _plain(graph: fx.Graph, op: Computation, x: fx.Node) -> fx.Node:
    """Emits the operation with the module's own weight and without its bias, on the input without adapters."""
    tracer = RuleTracer(graph)
    if x is not op.x or op.adds_computed or _has_change(op):
        weight = fx.Proxy(graph.create_node("get_attr", op.weight), tracer)
        return op.apply(fx.Proxy(x, tracer), weight).node
    if op.bias is None:
        return op.node
    bias = fx.Proxy(graph.create_node("get_attr", op.bias), tracer)
    return (fx.Proxy(op.node, tracer) - op.beside_outputs(bias)).node


def _has_change(op: Computation) -> bool:
    """Returns whether adapters have changed an operand of an operation."""
    return any(len(read_before(node)) > 1 for node in op.node.all_input_nodes)


def _change(graph: fx.Graph, rule: Any, weights: Mapping[str, fx.Node], attributes: Sources) -> fx.Proxy:
    """Emits the rule's change of a weight, from the present weight and the module's own."""
    return rule.change(given_to(rule.delta, RuleTracer(graph), weights, attributes, {}))


def _sum(weight: fx.Node, change: fx.Proxy) -> fx.Node:
    before: Any = fx.Proxy(weight, change.tracer)
    return (before + change.to(before.dtype)).node


def _operands(graph: fx.Graph, op: Computation, rule: Any, attributes: Sources) -> dict[str, fx.Node]:
    """Emits the operands of an operation, and the rule's changes of them, that the rule asks for."""
    asked = [asked_by(rule.rewrite)]
    if "change" in asked[0].names:
        asked.append(asked_by(rule.delta))
    if "bias_change" in asked[0].names and changes_bias(rule):
        asked.append(asked_by(rule.bias_delta))
    found = _operands_so_far(graph, op.weight, op.bias, changes_at(graph, op.name), asked)
    if "change" in asked[0].names:
        found["change"] = _change(graph, rule, found, attributes).node
    if "bias_change" in asked[0].names and changes_bias(rule):
        change = _bias_change(graph, rule, found, attributes)
        if change is not None:
            found["bias_change"] = change.node
    return found


def changed_bias(graph: fx.Graph, weight: str, bias: str, changes: Sequence[Tag]) -> fx.Node:
    """Emits a bias with the changes of adapters, given a tag of each, and returns it; raises as `insert` does."""
    return _operands_so_far(graph, weight, bias, changes, [asked_by(_of_bias)])["bias"]


def _of_bias(bias: Any) -> None:
    """Stands for a function that asks for the bias."""


def _operands_so_far(
    graph: fx.Graph, weight: str, bias: str | None, earlier: Sequence[Tag], asked: list[Asked]
) -> dict[str, fx.Node]:
    """Emits the operands of an operation that functions ask for, with the changes of earlier adapters."""
    asks_for_bias = any(each.may_be("bias") for each in asked)
    of_bias = [tag for tag in earlier if changes_bias(tag.rule)] if asks_for_bias else []
    asks_for_base_bias = any(
        each.may_be("base_bias") for each in (*asked, *(asked_by(tag.rule.bias_delta) for tag in of_bias))
    )
    asked = [*asked, *(asked_by(tag.rule.bias_delta) for tag in of_bias)]
    asks_for_weight = any(each.may_be("weight") for each in asked)
    found: dict[str, fx.Node] = {}
    if asks_for_weight or any(each.may_be("base") for each in asked):
        found["base"] = graph.create_node("get_attr", weight)
    if asks_for_weight:
        found["weight"] = found["base"]
    if bias is not None and (asks_for_bias or asks_for_base_bias):
        found["base_bias"] = graph.create_node("get_attr", bias)
    if bias is not None and asks_for_bias:
        found["bias"] = found["base_bias"]
    for tag in earlier:
        attributes = dict(tag.attributes)
        # a change of the bias uses the weight before the same adapter's change
        change = _bias_change(graph, tag.rule, found, attributes) if tag in of_bias else None
        if asks_for_weight and not tag.is_change:
            raise NoChangeError(weight, tag.slot)
        if asks_for_weight:
            found["weight"] = _sum(found["weight"], _change(graph, tag.rule, found, attributes))
        if change is not None:
            found["bias"] = _sum(found["bias"], change) if "bias" in found else change.node
    return found


def _bias_change(graph: fx.Graph, rule: Any, operands: Mapping[str, fx.Node], attributes: Sources) -> Any:
    """Emits the rule's change of a bias, or returns None if there is none."""
    if any(name not in operands for name in {"bias", "base_bias"} & {*asked_by(rule.bias_delta).needed}):
        return None  # without a bias, there is nothing to change
    absent = {"bias": None, "base_bias": None}
    return rule.bias_change(given_to(rule.bias_delta, RuleTracer(graph), operands, {**absent, **attributes}, {}))


def _around_leaf(graph: fx.Graph, op: Leaf, rule: Any, x: fx.Node, attributes: Sources) -> Replaced:
    """Emits the new output of a call, and returns it with the node that it replaces."""
    current = top(graph, op.output, op.name)
    outside = {user for user in current.users if user not in op.inside}
    with graph.inserting_before(current.next):
        result = _call(rule.rewrite, RuleTracer(graph), {"x": x, "y": current}, attributes, {"operation": op})
        _refuse_no_value(result, "rewrite")
    _replace(current, result.node, outside.__contains__)
    return {result.node: current}


def replace(
    graph: fx.Graph,
    op: Operation | Leaf,
    function: Callable[..., Any],
    nodes: Mapping[str, fx.Node],
    paths: Mapping[str, str],
) -> None:
    """Replaces an operation's value by the result of `function`."""
    assert not isinstance(op, Weight)
    if not isinstance(op, Leaf):
        _reading_own(graph, op, True, [*graph.nodes])
    users = set(op.node.users) - (op.inside if isinstance(op, Leaf) else set())
    with torch.enable_grad(), graph.inserting_before(op.node.next):
        result = _call(function, RuleTracer(graph), {**nodes, "x": op.x, "y": op.node}, paths, {"operation": op})
    _replace(op.node, result.node, users.__contains__)


def _at_boundary(graph: fx.Graph, op: Boundary, rule: BoundaryRule, attributes: Sources) -> Replaced:
    """Emits new arguments and a new output of a forward, and returns them with the nodes that they replace."""
    for tag in changes_at(graph, op.name):
        spent = [name for name in rule.reads_as_given if name in getattr(tag.rule, "spends", ())]
        if spent:
            raise ChangedInputError(spent[0], tag.slot)
    tracer = RuleTracer(graph)
    inputs = {name: fx.Proxy(node, tracer) for name, node in op.inputs.items()}
    inputs |= {name: fx.Proxy(_placeholder(graph, name), tracer) for name in rule.more_inputs}
    with graph.inserting_before(next(node for node in graph.nodes if node in op.inside)):
        entered: Mapping[str, fx.Proxy] = _call(rule.enter, tracer, {}, attributes, {"inputs": inputs})
    replaced = {}
    for name, new in entered.items():
        _refuse_no_value(new, "enter")
        old = inputs[name].node
        _replace(old, new.node, op.inside.__contains__)
        replaced[new.node] = old
    outside = {user for user in op.output.users if user not in op.inside}
    with graph.inserting_before(op.output.next):
        given = {"output": fx.Proxy(op.output, tracer), "inputs": inputs, "entered": entered}
        left = _call(rule.leave, tracer, {}, attributes, given)
    _refuse_no_value(left, "leave")
    if left is not given["output"]:
        _replace(op.output, left.node, outside.__contains__)
        replaced[left.node] = op.output
    return replaced


def _replace(old: fx.Node, new: fx.Node, where: Callable[[fx.Node], bool]) -> None:
    """Replaces `old` by `new` in its users for which `where` holds, and in the tags of the adapters among them."""
    users = list(filter(where, old.users))
    for user in users:
        user.replace_input_with(old, new)
    of_adapters = {(user.meta[TAG].slot, user.meta[TAG].site) for user in users if TAG in user.meta}
    if of_adapters:
        _exchange_places(new.graph, old.name, new.name, lambda tag: (tag.slot, tag.site) in of_adapters)


def _exchange_places(graph: fx.Graph, old: str, new: str, where: Callable[[Tag], bool]) -> None:
    """Replaces `old` by `new` as the replaced node in the tags for which `where` holds."""
    for node in graph.nodes:
        tag = node.meta.get(TAG)
        if tag is not None and tag.stands_for == old and where(tag):
            node.meta[TAG] = tag.standing_for(new)


def remove(graph: fx.Graph, slot: int) -> None:
    """Erases all nodes of the adapter in a slot from `graph`; their users get the replaced values again."""
    nodes = {node.name: node for node in graph.nodes}
    for node in reversed(list(graph.nodes)):
        tag = node.meta.get(TAG)
        if tag is None or tag.slot != slot:
            continue
        if node.op == "placeholder" and node.users:
            # another adapter uses this argument, too
            node.meta[TAG] = next(user.meta[TAG] for user in node.users if TAG in user.meta)
            node.meta[TAG] = dataclasses.replace(node.meta[TAG], over=None, enters_for=None)
            continue
        if tag.stands_for is not None:
            node.replace_all_uses_with(nodes[tag.stands_for])
            _exchange_places(graph, node.name, tag.stands_for, lambda _: True)
        graph.erase_node(node)


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """Returns the placeholder of an optional argument, which is added after the named arguments if it is missing."""
    there = next((node for node in graph.nodes if node.op == "placeholder" and node.target == name), None)
    if there is not None:
        return there
    behind = next(node for node in graph.nodes if node.op != "placeholder" or str(node.target).startswith("**"))
    with graph.inserting_before(behind):
        return graph.placeholder(name, default_value=None)


def _call(
    function: Callable[..., Any],
    tracer: RuleTracer,
    nodes: Mapping[str, fx.Node],
    paths: Mapping[str, str | CallInput | None],
    values: Mapping[str, Any],
) -> Any:
    """Calls a rule's function with the values that its argument names ask for, see `given_to`."""
    return function(**given_to(function, tracer, nodes, paths, values))
