"""Draws the mask of a branch's dropout again in the backward.

    dropout(h) Aᵀ    saves h and the state of the random generator, but neither dropout(h) nor the mask

Both are as large as h, and all branches share h. The mask is the same as that of ``F.dropout``, so a seed gives the
same results. Drawing the mask twice costs time; on a CPU it is the slowest part of a branch.
"""

from __future__ import annotations

from torch import fx, nn

from graphpeft.graph.ops.reading import arguments_of
from graphpeft.passes.outcome import Outcome
from graphpeft.passes.products import product
from graphpeft.passes.reading import FirstProduct, first_products, put_in_place_of


def regenerated_dropout(graph: fx.Graph, root: nn.Module) -> list[Outcome]:
    """Makes branches with dropout save their inputs instead of the masks."""
    found = [each for each in first_products(graph, root) if each.dropped is not None]
    return [Outcome(each.site, _regenerated(each)) for each in found]


def _regenerated(found: FirstProduct) -> str | None:
    """Makes one product draw its mask itself, or returns the reason to leave it."""
    assert found.dropped is not None
    if len(found.dropped.users) > 1:
        return "several nodes read the output of dropout"
    _, probability, training = arguments_of(found.dropped, "input", "p", "training")
    factor = found.factor(found.node)
    with found.node.graph.inserting_before(found.node):
        args = (found.h, found.h, factor, probability, training)
        put_in_place_of(found.node, found.node.graph.call_function(product, args))
    return None
