"""Edits graphs by rules: a rule's nodes go in behind the operation that they adapt, and come out without a trace.

A `Rule` is written as plain PyTorch code over the values of a site; `insert` runs that code on proxies, so that it
appends nodes to the graph. Every node of an adapter carries a `Tag`, so removing the adapter is erasing its nodes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.fx as fx
from torch.fx.proxy import GraphAppendingTracer

from graphpeft.ops import Linear

if TYPE_CHECKING:
    from graphpeft.sites import Site

TAG = "graphpeft"
"""The key of ``node.meta`` under which a node of an adapter carries its `Tag`."""


class ParameterSpec(NamedTuple):
    """A parameter that a rule creates at a site.

    Attributes:
        shape: Its shape.
        key: Its name in PEFT's files, behind the name of the module.
    """

    shape: tuple[int, ...]
    key: str


class Rule(Protocol):
    """How one method adapts one kind of operation.

    Rules are frozen values: equal rules give equal graphs, so what differs from site to site (shapes, scales) isn't
    theirs but comes from the site and the config.
    """

    def check(self, site: Site, config: Any) -> str | None:
        """Returns the reason why `site` can't be adapted, or None."""
        ...

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns what the rule creates at `site`, by name."""
        ...

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the numbers that ``rewrite`` reads, by name; they live on the weight's module."""
        ...

    def initialise(self, parameters: Mapping[str, torch.Tensor], config: Any) -> None:
        """Fills new parameters with their first values."""
        ...

    @property
    def rewrite(self) -> Callable[..., Any]:
        """A function that returns the new value of the operation.

        The names of its arguments say what it is given: ``x`` and ``y``, the operation's input and its value so far;
        ``weight`` and ``bias``; ``training``; ``transposed``, whether the weight is stored as (in, out); and the
        parameters and constants that the rule declares (None for one that it doesn't). It is run on proxies.
        """
        ...

    @property
    def delta(self) -> Callable[..., torch.Tensor]:
        """A function of the site, the parameters and the constants, by name, that returns the weight's change.

        It has the weight's shape as it is stored, and equals what ``rewrite`` adds outside of training.
        """
        ...


class AdaptedSite(NamedTuple):
    """A site with the rule that adapts it and what the rule creates there.

    Attributes:
        site: The site.
        rule: The rule.
        specs: The rule's parameters by name.
        constants: The rule's constants by name.
        names: The attributes of the weight's module under which these live, by the rule's names for them.
        dtype: The dtype of the parameters.
    """

    site: Site
    rule: Rule
    specs: Mapping[str, ParameterSpec]
    constants: Mapping[str, float]
    names: Mapping[str, str]
    dtype: torch.dtype

    @property
    def parameter_count(self) -> int:
        """The number of elements that the rule's parameters have."""
        return sum(prod(spec.shape) for spec in self.specs.values())


@dataclass(frozen=True)
class Tag:
    """Whose a node is.

    Attributes:
        adapter: The name of the adapter.
        method: The method's `peft_type`.
        site: The name of the node of the adapted operation.
        over: On the node with the new value, the name of the node whose value it replaced; else None.
    """

    adapter: str
    method: str
    site: str
    over: str | None = None


def insert(graph: fx.Graph, op: Linear, rule: Rule, attributes: Mapping[str, str], adapter: str, method: str) -> None:
    """Puts the nodes of `rule` behind `op`, on top of those of other adapters.

    Args:
        graph: Edited in place.
        op: The operation, a part of `graph`.
        rule: The rule.
        attributes: The paths, in the module that owns the graph, of the rule's parameters and constants by name.
        adapter: The adapter's name.
        method: The `peft_type` of its method.
    """
    current = _top(graph, op)
    after = current.next
    with graph.inserting_before(after):
        result = rule.rewrite(**_values(graph, op, current, rule, attributes)).node
    new = _between(current, after)
    for node in new:
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
        else:
            node.meta[TAG] = Tag(adapter, method, op.node.name, current.name if node is result else None)
    current.replace_all_uses_with(result, delete_user_cb=lambda user: user not in new)


def remove(graph: fx.Graph, adapter: str) -> None:
    """Erases all nodes of `adapter` from `graph`; what used their value uses the operation's own again."""
    nodes = {node.name: node for node in graph.nodes}
    for node in reversed(list(graph.nodes)):
        tag = node.meta.get(TAG)
        if tag is None or tag.adapter != adapter:
            continue
        if tag.over is not None:
            node.replace_all_uses_with(nodes[tag.over])
            for other in graph.nodes:
                if TAG in other.meta and other.meta[TAG].over == node.name:
                    other.meta[TAG] = dataclasses.replace(other.meta[TAG], over=tag.over)
        graph.erase_node(node)


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    nodes = []
    node = first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


def _top(graph: fx.Graph, op: Linear) -> fx.Node:
    """Returns the node with the operation's value after all adapters that are there."""
    tops = [n for n in graph.nodes if TAG in n.meta and n.meta[TAG].site == op.node.name and n.meta[TAG].over]
    return tops[-1] if tops else op.node


def _values(graph: fx.Graph, op: Linear, current: fx.Node, rule: Rule, attributes: Mapping[str, str]) -> dict[str, Any]:
    """Returns what the rule's function asks for by the names of its arguments."""
    tracer = GraphAppendingTracer(graph)
    paths = {"weight": op.weight, "bias": op.bias, "training": "training", **attributes}
    nodes = {"x": op.x, "y": current}
    values: dict[str, Any] = {}
    for name in inspect.signature(rule.rewrite).parameters:
        if name not in nodes and paths.get(name) is not None:
            nodes[name] = graph.create_node("get_attr", str(paths[name]))
        values[name] = fx.Proxy(nodes[name], tracer) if name in nodes else None
    return values | ({"transposed": op.transposed} if "transposed" in values else {})
