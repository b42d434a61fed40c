"""Casts a branch's input again in the backward.

    x.to(fp32) Aᵀ    saves x instead of its cast

The cast of a half precision input is twice as large as the input, and each branch makes one. All branches share the
input, and other operations may save it anyway.
"""

from __future__ import annotations

from torch import fx, nn

from graphpeft.passes.outcome import Outcome
from graphpeft.passes.products import product
from graphpeft.passes.reading import FirstProduct, cast_from, first_products, put_in_place_of


def recomputed_casts(graph: fx.Graph, root: nn.Module) -> list[Outcome]:
    """Makes branches save the inputs of their casts instead of the casts."""
    found = [each for each in first_products(graph, root) if cast_from(each.h) is not None]
    return [Outcome(each.site, _recomputed(each)) for each in found]


def _recomputed(found: FirstProduct) -> str | None:
    """Makes one product cast again, or returns the reason to leave it."""
    if found.dropped is not None:
        return "dropout is between the cast and the product; regenerated_dropout would make it a part of the product"
    factor = found.factor(found.node)
    with found.node.graph.inserting_before(found.node):
        args = (cast_from(found.h), found.h, factor, *found.dropout)
        put_in_place_of(found.node, found.node.graph.call_function(product, args))
    return None
