"""The uses of each weight in a graph."""

from __future__ import annotations

import itertools
import operator
from typing import Any, NamedTuple

from torch import fx, nn

from graphpeft.graph import ops
from graphpeft.graph.dependencies import reads_metadata_only
from graphpeft.graph.tags import TAG
from graphpeft.graph.template import Template
from graphpeft.sites import dataflow


class WeightUses(NamedTuple):
    """The uses of one weight in a graph.

    Attributes:
        op: The kind of the operations that use the weight; ``ops.Weight`` if they are of several kinds, or of none.
        nodes: The names of these operations in each graph; for ``ops.Weight``, of the nodes that read the weight.
        transposed: Whether the first operation reads the weight as (in, out).
        groups: The operations' number of groups of features, or the path of the attribute that has it.
        shortens: Whether an operation shortens the rows that it reads.
        others: The names of other functions that use the weight.
        is_called_beside: Whether calls of its module use the weight, and other nodes, too.
        is_unused: Whether no result of the weight reaches an output.
        bias: The path of the tensor that all operations add, or None.
        bias_conflict: Why a change of the added bias can't be a change of that tensor, or None.
        both_ways: Whether some of the operations read the weight as (in, out), and others as (out, in).
        is_called: Whether operations are calls of the weight's module.
    """

    op: Any
    nodes: tuple[tuple[str, ...], ...]
    transposed: bool
    groups: int | str
    shortens: bool
    others: tuple[str, ...]
    is_called_beside: bool
    is_unused: bool
    bias: str | None
    bias_conflict: str | None
    both_ways: bool
    is_called: bool = False


def weight_uses(template: Template, module: nn.Module) -> dict[str, WeightUses]:
    """Returns the uses of each weight in the graphs, by the weight's path in `module`."""
    uses: dict[str, WeightUses] | None = template.facts.get("uses")
    if uses is None:
        found = [ops.find_ops(graph, module) for graph in template.graphs]
        alive = set().union(*(dataflow.reaching_output(graph) for graph in template.graphs))
        paths = [op.weight for of_graph in found for op in of_graph]
        paths += [str(node.target) for graph in template.graphs for node in graph.nodes if node.op == "get_attr"]
        uses = {path: _uses_of(path, template, found, alive) for path in dict.fromkeys(paths)}
        template.facts["uses"] = uses
    return uses


def _uses_of(path: str, template: Template, found: list[list[ops.Computation]], alive: set[fx.Node]) -> WeightUses:
    own = [[op for op in of_graph if op.weight == path] for of_graph in found]
    all_own = [op for of_graph in own for op in of_graph]
    by_graph = zip(template.graphs, own, strict=True)
    others = tuple(dict.fromkeys(itertools.chain(*(ops.other_uses(graph, path, using) for graph, using in by_graph))))
    kinds = {(type(op), _number_or_path(op.groups)) for op in all_own}
    is_of_one_kind = len(kinds) == 1 and not others
    places = own if is_of_one_kind else [ops.reads(graph, path) for graph in template.graphs]
    nodes = tuple(tuple(op.name for op in of_graph) for of_graph in places)
    op, groups = next(iter(kinds)) if is_of_one_kind else (ops.Weight, 1)
    is_unused = not any(op.node in alive for of_graph in places for op in of_graph)
    is_called = "call_module" in {op.node.op for op in all_own}
    is_called_beside = not is_of_one_kind and is_called
    transposed = bool(all_own) and all_own[0].transposed
    biases = {op.bias for op in all_own} if is_of_one_kind else set()
    bias = biases.pop() if len(biases) == 1 else None
    conflict = _bias_conflict(template, all_own, bias) if is_of_one_kind else None
    both_ways = is_of_one_kind and len({op.transposed for op in all_own}) > 1
    shortens = any(isinstance(op, ops.Embedding) and op.shortens for op in all_own)
    of_bias = bias, conflict, both_ways
    return WeightUses(op, nodes, transposed, groups, shortens, others, is_called_beside, is_unused, *of_bias, is_called)


def _bias_conflict(template: Template, operations: list[ops.Computation], bias: str | None) -> str | None:
    if any(op.adds_computed for op in operations):
        return "an operation adds what is computed, and no bias of its own"
    if bias is None:
        return "its operations add other biases each" if any(op.bias is not None for op in operations) else None
    nodes = {op.node for op in operations}
    read = [place.node for graph in template.graphs for place in ops.reads(graph, bias)]
    users = [user for node in read for user in node.users if TAG not in user.meta and user not in nodes]
    return f"its bias {bias} is read elsewhere, too" if any(not reads_metadata_only(user) for user in users) else None


def _number_or_path(value: Any) -> int | str:
    # equal modules share a graph, which reads the number from the module
    return str(value.target) if isinstance(value, fx.Node) else value


def number_in(module: nn.Module, value: int | str) -> int:
    """Returns a number, or reads it at a path from the module."""
    return operator.attrgetter(value)(module) if isinstance(value, str) else value
