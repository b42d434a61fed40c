"""Finds the rows of a fused projection's parts: of q, k and v in a ``qkv`` layer.

The graph around the layer shows them. Its views, splits and permutations of the layer's output run on the indices of
the output's features instead of their values, so that each part ends up with the indices of its rows, whatever the
layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch.fx.node import map_arg

from graphpeft.graph.dependencies import above
from graphpeft.graph.errors import TraceError
from graphpeft.graph.template import VALUE
from graphpeft.sites.regions import Regions
from graphpeft.sites.site import Runs, Site

NAMES = ("q", "k", "v")

_VIEWS = frozenset((
    "view", "reshape", "permute", "transpose", "swapaxes", "movedim", "unbind", "split", "chunk", "tensor_split",
    "getitem", "squeeze", "unsqueeze", "flatten", "unflatten", "contiguous", "clone", "select", "narrow", "t",
))  # fmt: skip
"""Functions and methods that move features without changing them."""


def parts_of(regions: Regions, site: Site) -> dict[str, Runs]:
    """Returns the rows of q, k and v in a fused projection, by name."""
    features = site.shape[1] if site.transposed else site.shape[0]
    if site.region != site.owner:
        graph = regions.templates[site.region].graphs[0]
        output = next(node for node in graph.nodes if node.name == site.nodes[0][0])
        return parts_found(graph, output, features)
    path, inside = regions.around(site.owner)
    if path is None:
        raise TraceError("no module is around it")
    inputs = regions.inputs_of(path)
    graph = regions.recordings.lift(regions.modules[path], inputs).graphs[0]
    output = next((node for node in graph.nodes if node.op == "call_module" and node.target == inside), None)
    if output is None:
        raise TraceError(f"{path or 'the model'} doesn't call it by itself")
    return parts_found(graph, output, features)


def parts_found(graph: fx.Graph, output: fx.Node, features: int) -> dict[str, Runs]:
    """Returns the rows of q, k and v in a projection, by name.

    Args:
        graph: A graph with example values.
        output: The node of the projection's output, of shape (..., features).
        features: The number of its features.
    """
    if not isinstance(output.meta.get(VALUE), torch.Tensor):
        raise TraceError("the shape of its output isn't known; pass example_inputs")
    numbers: dict[fx.Node, Any] = {output: torch.arange(features).expand(output.meta[VALUE].shape).contiguous()}
    ends: dict[tuple[int, ...], fx.Node] = {}
    for node in graph.nodes:
        if is_view(node) and any(source in numbers for source in node.all_input_nodes):
            numbers[node] = _on_numbers(node, numbers)
            if isinstance(numbers[node], torch.Tensor):
                ends.setdefault(tuple(sorted(set(numbers[node].flatten().tolist()))), node)
    ends.pop(tuple(range(features)), None)
    parts = _in_order(ends)
    if len(parts) != len(NAMES) or sorted(itertools.chain(*parts)) != list(range(features)):
        raise TraceError(
            f"its output isn't parted into {', '.join(NAMES)} by views alone, but into {len(parts)} parts of "
            f"{[len(part) for part in parts]} features"
        )
    rows_of = {ends[rows]: rows for rows in parts}
    return {name: runs_of(rows_of[end]) for name, end in zip(NAMES, _as_attended(graph, list(rows_of)), strict=True)}


def runs_of(rows: tuple[int, ...]) -> Runs:
    """Returns sorted rows as runs of consecutive rows."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return tuple(runs)


def is_view(node: fx.Node) -> bool:
    """Returns whether a node moves features, or rows, without changing them."""
    return node.op in ("call_function", "call_method") and _name(node) in _VIEWS


def _on_numbers(node: fx.Node, numbers: Mapping[fx.Node, Any]) -> Any:
    def value_of(source: fx.Node) -> Any:
        return numbers[source] if source in numbers else source.meta[VALUE]

    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    target: Any = node.target
    return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)


def _in_order(ends: Mapping[tuple[int, ...], fx.Node]) -> list[tuple[int, ...]]:
    """Returns the parts in the order of their first rows, without parts that lie inside others."""
    whole = [rows for rows in ends if not any(set(rows) < set(other) for other in ends)]
    return sorted(whole)


def _as_attended(graph: fx.Graph, ends: list[fx.Node]) -> list[fx.Node]:
    """Returns three nodes in the order of queries, keys and values of the first attention."""
    for node in graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            return _one_candidate_each(ends, [_arguments_above(node, index) for index in range(3)])
        if _name(node) == "softmax" and _is_over_last_dim(node):
            scored = above(node)
            scores = _first_meeting(graph, node, [end for end in ends if end in scored])
            outside = set(ends) - scored
            return _one_candidate_each(ends, [*(above(source) for source in scores), outside])
    raise TraceError("the graph has no attention that tells its queries from its keys and values")


def _one_candidate_each(ends: list[fx.Node], sides: list[set[fx.Node]]) -> list[fx.Node]:
    found = [[end for end in ends if end in side] for side in sides]
    ordered = [candidates[0] for candidates in found if len(candidates) == 1]
    if len(set(ordered)) != len(NAMES):
        raise TraceError("the attention doesn't take its queries, keys and values from one part each")
    return ordered


def _first_meeting(graph: fx.Graph, scores: fx.Node, ends: list[fx.Node]) -> list[fx.Node]:
    """Returns the inputs, in order, of the first node where two of `ends` meet, each by one input.

    The list is empty if that node doesn't multiply queries by keys.
    """
    for node in graph.nodes:
        sides = [source for source in node.all_input_nodes if len(above(source) & set(ends)) == 1]
        # pieces of one part meet as well, in rotary position embeddings
        meeting = set().union(*(above(source) & set(ends) for source in sides))
        if len(sides) == len(meeting) == len(ends) == 2:
            exchanged = [other for other in above(scores) if node in above(other) and _name(other) in _TRANSPOSING]
            return sides if _name(node) in _PRODUCTS and not exchanged else []
    return []


_PRODUCTS = ("matmul", "bmm", "baddbmm")
"""Functions that multiply queries by keys, so that the scores have a row for each query."""

_TRANSPOSING = ("transpose", "permute", "swapaxes", "movedim", "t", "getattr", "adjoint")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_over_last_dim(softmax: fx.Node) -> bool:
    """Returns whether a softmax goes over the last dimension, that of the keys."""
    value = softmax.meta.get(VALUE)
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    return isinstance(value, torch.Tensor) and dim in (-1, value.ndim - 1)


def _arguments_above(node: fx.Node, index: int) -> set[fx.Node]:
    given = dict(zip(("query", "key", "value"), node.args, strict=False)) | dict(node.kwargs)
    source = given[("query", "key", "value")[index]]
    return above(source) if isinstance(source, fx.Node) else set()
