"""Edits graphs by rules: a rule's nodes go in behind the operation that they adapt, and come out without a trace.

A `Rule` is written as plain PyTorch code over the values of a site; `insert` runs that code on proxies, so that it
appends nodes to the graph. Every node of an adapter carries a `Tag`, so removing the adapter is erasing its nodes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.fx as fx
from torch import nn
from torch.fx.proxy import GraphAppendingTracer

from graphpeft.graph import slots
from graphpeft.graph.calls import CALLS, calls_of
from graphpeft.graph.ops import Operation, Weight
from graphpeft.graph.ops.boundaries import Boundary, Leaf
from graphpeft.graph.tags import TAG, Tag, top, values_over

if TYPE_CHECKING:
    from graphpeft.sites.site import CallSite, LeafSite, Site

Op = Operation | Boundary


class FileForm(NamedTuple):
    """How a parameter is written in files, where that is otherwise than the model has it.

    Attributes:
        shape: Its shape there.
        pack: Returns what is written, from the parameter.
        unpack: Returns the parameter, from what is read; raises ValueError for what it can't be.
    """

    shape: tuple[int, ...]
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]


class ParameterSpec(NamedTuple):
    """A parameter that a rule creates at a site.

    Attributes:
        shape: Its shape.
        key: Its name in PEFT's files, behind the name of the module.
        is_trained: Whether it is trained, where the adapter is.
        form: Its form in files, if that is another one.
        shared: At a site that is tied to another one: which of that one's parameters it is.
    """

    shape: tuple[int, ...]
    key: str
    is_trained: bool = True
    form: FileForm | None = None
    shared: str | None = None


class Rule(Protocol):
    """How one method adapts one kind of operation.

    Rules are frozen values, best dataclasses: equal rules give equal graphs, so what differs from site to site (shapes,
    scales) isn't theirs but comes from the site and the config. A rule that inherits from this class, and not only
    looks like it, gets what is the same in most rules.
    """

    def check(self, site: Any, config: Any) -> str | None:
        """Returns the reason why `site` can't be adapted, or None."""
        return None

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns what the rule creates at `site`, by name."""
        ...

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns the numbers that ``rewrite`` reads, by name; they live on the weight's module."""
        return {}

    def initialise(
        self, parameters: Mapping[str, torch.Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, torch.Tensor] | None:
        """Fills new parameters, on the CPU, with their first values.

        Args:
            parameters: The parameters by name, without values.
            site: The site.
            config: The config.
            module: The module of the weight beside which they live.

        Returns:
            Where the rule has ``replaces``, and it holds for the site: the tensor that the module reads in place of the
            weight, by the weight's name.
        """
        ...


class WeightRule(Rule, Protocol):
    """How one method adapts operations that use a weight, and calls of modules that are no such operation."""

    def rewrite(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the new value of the operation; it is not asked where the weight itself is the site.

        The names of its arguments say what it is given: ``x`` and ``y``, the operation's input and its value so far;
        ``weight`` and ``bias``, with the changes of adapters that act before, and ``base``, the weight without them;
        ``operation``, which has ``apply(x, weight)``: the same operation with other operands;
        ``training``; and the parameters and constants that the rule declares (None for one that it doesn't). It is run
        on proxies.
        """
        raise TypeError(f"{type(self).__name__} has no rewrite, which makes the new value of an operation")

    def unmergeable(self, site: Any) -> str | None:
        """Returns the reason why what ``rewrite`` does at `site` is no change of the weight and the bias, or None."""
        return None

    def delta(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the weight's change from the ``weight``, the parameters and the constants, which it names.

        It has the weight's shape as it is stored, and equals what ``rewrite`` adds outside of training. It is run on
        tensors, and on proxies where the weight itself is the site. ``weight`` is what other adapters have made of it
        so far; ``base`` is what the module itself has. Name them only if the change depends on them: of two such
        adapters at one weight, one isn't merged without the other where that would give something else.

        A rule may also have ``bias_delta``, a function of the parameters and the constants by name that returns the
        change of the bias that the operation adds, or None; and ``replaces``, a function of the site and the config
        that tells whether the module reads another weight than its own while the adapter acts: a frozen stand-in, which
        ``initialise`` returns. It isn't saved, so ``initialise`` computes it anew where a file is loaded. It isn't
        asked where the site is unmergeable.
        """
        raise TypeError(
            f"{type(self).__name__} has no delta, the change of a weight; let unmergeable say why there is none"
        )


class BoundaryRule(Rule, Protocol):
    """How one method adapts what a module is given and what it returns."""

    @property
    def more_inputs(self) -> tuple[str, ...]:
        """The names of arguments that the forward gets beside its own; they are None unless they are given."""
        return ()

    def enter(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Returns the new values of arguments, by name.

        It names what it is given: ``inputs``, the arguments by name, ``training``, the parameters and constants that
        the rule declares, and what the site lets it read. It is run on proxies.
        """
        return {}

    def leave(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the new value of what the module returns.

        Beside what ``enter`` is given, it can ask for ``output`` and for ``entered``, what ``enter`` has returned.
        """
        return kwargs["output"]


class NoChangeError(Exception):
    """A change of a weight depends on those before it, and what an adapter does before it is none.

    Args:
        weight: The path of the weight.
        slot: The slot of the adapter before.
    """

    def __init__(self, weight: str, slot: int) -> None:
        super().__init__(f"what the adapter in slot {slot} does with {weight} is no change of it")
        self.weight, self.slot = weight, slot


class AdaptedSite(NamedTuple):
    """A site with the rule that adapts it and what the rule creates there.

    Attributes:
        site: The site.
        rule: The rule.
        specs: The rule's parameters by name.
        constants: The rule's constants by name.
        names: The attributes of the weight's module under which these live, by the rule's names for them.
        dtype: The dtype of the parameters.
        replaced: The names of the adapter's frozen stand-ins, by the names of what the weight's module has itself.
        shared: The parameters that are those of another site: their module's path and their names there.
    """

    site: Site | LeafSite | CallSite
    rule: Any
    specs: Mapping[str, ParameterSpec]
    constants: Mapping[str, float]
    names: Mapping[str, str]
    dtype: torch.dtype
    replaced: Mapping[str, str] = MappingProxyType({})
    shared: Mapping[str, tuple[str, str]] = MappingProxyType({})

    @property
    def stems(self) -> set[str]:
        """The names of these attributes without that of the adapter."""
        return {f"{self.site.prefix}{name}" for name in self.names}

    def in_slot(self, slot: int) -> Mapping[str, str]:
        """Returns the names of these attributes in graphs, where the adapter has a slot; likewise."""
        return _in_slot(tuple(self.names), self.site.prefix, slot)

    @property
    def unmergeable(self) -> str | None:
        """The reason why what the adapter does at the site is no change of a weight, or None."""
        return self.site.unmergeable or self.rule.unmergeable(self.site)

    @property
    def parameter_count(self) -> int:
        """The number of elements that the rule's own parameters have."""
        return sum(prod(spec.shape) for name, spec in self.specs.items() if name not in self.shared)


# equal sites share one
@functools.lru_cache(maxsize=1024)
def _in_slot(of_rule: tuple[str, ...], prefix: str, slot: int) -> Mapping[str, str]:
    return {name: slots.in_slot(f"{prefix}{name}", slot) for name in of_rule}


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


def _behind(graph: fx.Graph, op: Operation, rule: WeightRule, attributes: Mapping[str, str]) -> dict[fx.Node, fx.Node]:
    """Emits the operation's new value, and returns for it the node in whose place it is."""
    current = top(graph, op.node)
    before = set(graph.nodes)
    with graph.inserting_before(current.next):
        if isinstance(op, Weight):
            result = _changed(graph, rule, current, op.node, attributes)
        else:
            operands = _operands_so_far(graph, op, rule.rewrite)
            emitted = [node for node in graph.nodes if node not in before]
            nodes = {"x": op.x, "y": current, **operands}
            result = _call(rule.rewrite, graph, nodes, {"bias": None, **attributes}, {"operation": op})
            for node in [node for node in reversed(emitted) if not node.users]:
                graph.erase_node(node)
    _replace(current, result.node, before.__contains__)
    return {result.node: current}


def _changed(
    graph: fx.Graph, rule: WeightRule, weight: fx.Node, base: fx.Node, attributes: Mapping[str, str]
) -> fx.Proxy:
    """Emits a weight with the change that `rule` makes of it, from what it was before, and from the module's own."""
    change = _call(rule.delta, graph, {"weight": weight, "base": base}, attributes, {})
    before = fx.Proxy(weight, change.tracer)
    return before + change.to(before.dtype)


def _operands_so_far(graph: fx.Graph, op: Operation, function: Callable[..., Any]) -> dict[str, fx.Node]:
    """Emits the operands of an operation for which a rule's function asks, as the adapters before it have made them.

    Raises:
        NoChangeError: If what one of these does is no change of the weight.
    """
    assert not isinstance(op, Weight)
    asked = set(_names_asked_by(function)) | ({"weight", "base", "bias"} if _takes_more(function) else set())
    earlier = [node.meta[TAG] for node in values_over(graph, op.node)]
    found: dict[str, fx.Node] = {}
    if asked & {"weight", "base"}:
        weight = base = graph.create_node("get_attr", op.weight)
        for tag in earlier:
            if getattr(type(tag.rule), "delta", WeightRule.delta) is WeightRule.delta:
                raise NoChangeError(op.weight, tag.slot)
            weight = _changed(graph, tag.rule, weight, base, dict(tag.attributes)).node
        found = {"weight": weight, "base": base}
    if "bias" in asked:
        own = None if op.bias is None else graph.create_node("get_attr", op.bias)
        bias = None if own is None else fx.Proxy(own, GraphAppendingTracer(graph))
        for tag in earlier:
            bias_delta = getattr(tag.rule, "bias_delta", None)
            change = None if bias_delta is None else _call(bias_delta, graph, {}, dict(tag.attributes), {})
            if change is not None:
                bias = change if bias is None else bias + change
        found |= {} if bias is None else {"bias": bias.node}
    return found


def _around_leaf(graph: fx.Graph, op: Leaf, rule: WeightRule, attributes: Mapping[str, str]) -> dict[fx.Node, fx.Node]:
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
    names = _names_asked_by(function)
    if _takes_more(function):
        names += [name for name in (*values, *nodes, *paths) if name not in names]
    paths = {"training": "training", **paths}
    given: dict[str, Any] = {}
    for name in names:
        path = paths.get(name)
        if name in values:
            given[name] = values[name]
        elif name in nodes:
            given[name] = fx.Proxy(nodes[name], tracer)
        else:
            given[name] = fx.Proxy(graph.create_node("get_attr", path), tracer) if path is not None else None
    return function(**given)


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _names_asked_by(function: Callable[..., Any]) -> list[str]:
    """Returns the names of a function's arguments."""
    asked = inspect.signature(function).parameters
    return [name for name, parameter in asked.items() if parameter.kind not in _VARIABLE]


def _takes_more(function: Callable[..., Any]) -> bool:
    """Tells whether a function takes ``**others``."""
    return any(parameter.kind in _VARIABLE for parameter in inspect.signature(function).parameters.values())
