"""Casts a branch's input again in the backward.

    x.to(fp32) Aᵀ    keeps x, and not its cast

The cast of a half precision input is twice as large as the input, and each branch has its own; the input is one tensor
for all branches that read it, and other operations may keep it as well.
"""

from __future__ import annotations

from torch import fx, nn

from graphpeft.passes.outcome import Outcome
from graphpeft.passes.products import product
from graphpeft.passes.reading import FirstProduct, cast_from, first_products, put_in_place_of


def recomputed_casts(graph: fx.Graph, root: nn.Module) -> list[Outcome]:
    """Lets branches keep what they cast."""
    found = [each for each in first_products(graph, root) if cast_from(each.h) is not None]
    return [Outcome(each.site, _recomputed(each)) for each in found]


def _recomputed(found: FirstProduct) -> str | None:
    """Lets one product cast again, or returns the reason why not."""
    if found.dropped is not None:
        return "dropout is between the cast and the product; the pass regenerated_dropout would take it into that"
    factor = found.factor(found.node)
    with found.node.graph.inserting_before(found.node):
        args = (cast_from(found.h), found.h, factor, *found.dropout)
        put_in_place_of(found.node, found.node.graph.call_function(product, args))
    return None
