"""Casts what several branches read once.

    x.to(fp32) A₁ᵀ, x.to(fp32) A₂ᵀ    become    h = x.to(fp32), h A₁ᵀ, h A₂ᵀ

Adapters of half precision weights are in single precision mostly, and so is each branch's input. In a graph that has
several of them, those of one x are one tensor: it is made once, and kept once for the backward.
"""

from __future__ import annotations

from torch import fx, nn

from graphpeft.graph.tags import TAG
from graphpeft.passes.outcome import Outcome
from graphpeft.passes.products import cast_again
from graphpeft.passes.reading import cast_from, put_in_place_of, separates


def shared_casts(graph: fx.Graph, root: nn.Module) -> list[Outcome]:
    """Lets branches share the casts of their inputs."""
    outcomes = []
    known: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        x = cast_from(node)
        if x is None:
            # what a node writes into may have another value behind it
            known = {} if separates(node, root) else known
        elif TAG not in x.meta:
            reason = None if x in known else "no cast of what it casts comes before it"
            outcomes.append(Outcome(node.meta[TAG].site, reason))
            if x in known:
                with graph.inserting_before(node):
                    put_in_place_of(node, graph.call_function(cast_again, (known[x], x, node.args[1])))
            else:
                known[x] = node
    return outcomes
