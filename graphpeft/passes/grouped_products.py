"""Multiplies the common input of several branches by all of their A's at once.

    h A₁ᵀ, h A₂ᵀ, …    become    h [A₁; A₂; …]ᵀ, split into the products

Each single product has only rank columns but reads all of h, in the forward and for the gradient of A. Autograd would
also add up the gradients of h. Branches with dropout don't change, since each has its own mask.
"""

from __future__ import annotations

import operator

from torch import fx, nn

from graphpeft.graph.dependencies import separates
from graphpeft.passes.outcome import Outcome
from graphpeft.passes.products import products
from graphpeft.passes.reading import FirstProduct, cast_from, first_products, put_in_place_of


def grouped_products(graph: fx.Graph, root: nn.Module) -> list[Outcome]:
    """Groups the first products of branches with the same input."""
    outcomes = []
    for group in _groups(graph, root):
        alone = "no other branch has the same input" if len(group) == 1 else None
        if group[0].dropped is not None or group[0].dropout:
            alone = "its dropout has a mask of its own"
        if alone is None:
            _group(graph, group)
        outcomes += [Outcome(each.site, alone) for each in group]
    return outcomes


def _groups(graph: fx.Graph, root: nn.Module) -> list[list[FirstProduct]]:
    """Returns groups of first products with the same input; a product with dropout is a group of its own."""
    by_node = {each.node: each for each in first_products(graph, root)}
    groups: list[list[FirstProduct]] = []
    open_groups: dict[tuple[fx.Node, fx.Node], list[FirstProduct]] = {}
    for node in graph.nodes:
        found = by_node.get(node)
        if found is None:
            # after a write, or at the edge of an autocast region, an input may have another value
            open_groups = {} if separates(node, root) else open_groups
        elif found.dropped is not None or found.dropout:
            groups.append([found])
        else:
            read = (found.kept, cast_from(found.h) or found.h)
            if read not in open_groups:
                groups.append([])
                open_groups[read] = groups[-1]
            open_groups[read].append(found)
    return groups


def _group(graph: fx.Graph, group: list[FirstProduct]) -> None:
    first = group[0]
    factors = [each.factor(first.node) for each in group]
    with graph.inserting_before(first.node):
        together = graph.call_function(products, (first.kept, first.h, None, *factors))
        together.meta = dict(first.node.meta)
    for index, each in enumerate(group):
        with graph.inserting_before(each.node):
            put_in_place_of(each.node, graph.call_function(operator.getitem, (together, index)))
