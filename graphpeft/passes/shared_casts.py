"""Casts the common input of several branches once.

    x.to(fp32) A₁ᵀ, x.to(fp32) A₂ᵀ    become    h = x.to(fp32), h A₁ᵀ, h A₂ᵀ

Adapters of half precision weights are mostly in single precision, so each branch casts its input. Branches in one graph
share the cast of one x, which is made once, and saved once for the backward.
"""

from __future__ import annotations

from torch import fx, nn

from graphpeft.graph.dependencies import separates
from graphpeft.graph.tags import TAG
from graphpeft.passes.outcome import Outcome
from graphpeft.passes.products import cast_again
from graphpeft.passes.reading import cast_from, put_in_place_of


def shared_casts(graph: fx.Graph, root: nn.Module) -> list[Outcome]:
    """Makes branches share the casts of their inputs."""
    outcomes = []
    known: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        x = cast_from(node)
        if x is None:
            # after a write, or at the edge of an autocast region, x may have another value
            known = {} if separates(node, root) else known
        elif TAG not in x.meta:
            reason = None if x in known else "there is no earlier cast of its input"
            outcomes.append(Outcome(node.meta[TAG].site, reason))
            if x in known:
                with graph.inserting_before(node):
                    put_in_place_of(node, graph.call_function(cast_again, (known[x], x, node.args[1])))
            else:
                known[x] = node
    return outcomes
