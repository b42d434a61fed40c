"""Targets found in the graph: the linear operations that feed the queries, keys or values of attentions."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, fx

from graphpeft._torch import pytree
from graphpeft.graph import ops
from graphpeft.graph.template import VALUE, template_of
from graphpeft.graph.traced_model import stands_for
from graphpeft.sites.attentions import LAYERS, attentions
from graphpeft.sites.dataflow import feeding_directly


def feeding(traced: fx.GraphModule, role: Literal["query", "key", "value"]) -> list[str]:
    """Returns the names, for `target_modules`, of the linear operations that feed the attentions' `role`.

    These are the last linear operations before the attention, even if other nodes reshape, normalise or rotate their
    outputs. Where one projection computes query, key and value, each role gives this projection.

    Args:
        traced: A model traced with example inputs.
        role: The input of the attentions.

    Raises:
        ValueError: If no linear operation feeds an attention, or an attention is a layer with its projections inside,
            as ``nn.MultiheadAttention`` is, or if the model isn't traced with example inputs.

    Examples:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        ...
        ...     def forward(self, x):
        ...         return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        >>> feeding(trace(nn.Sequential(Attention()), (torch.randn(2, 5, 8),)), "query")
        ['0.q']
    """
    template = template_of(traced)
    if template is None:
        raise ValueError(f"a {type(traced).__name__} isn't traced; pass trace(model, example_inputs)")
    graph = template.graphs[template.index(traced)]
    values = {node.name: node.meta[VALUE] for node in graph.nodes if VALUE in node.meta}
    if not values:
        raise ValueError("the graph has no example values, by which attentions are known; trace it with example_inputs")
    computed = {op.node: op for op in ops.find_ops(graph, traced)}

    def has_tensors(node: fx.Node) -> bool:
        # a node without tensors is a shape or the like, which carries no values
        return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(values.get(node.name)))

    found: dict[str, None] = {}
    for attention in attentions(traced, graph, values):
        if attention.node.op == "call_module" and isinstance(traced.get_submodule(str(attention.node.target)), LAYERS):
            path = str(attention.node.target)
            layer = stands_for(traced.get_submodule(path)).__name__
            raise ValueError(f"{path} is a {layer}, whose projections are inside it; name it in target_modules itself")
        read: fx.Node | None = getattr(attention, role)
        before = feeding_directly(graph, read, computed, has_tensors) if read is not None else []
        for op in (computed[node] for node in before):
            if isinstance(op, ops.Linear):
                found[op.weight.removesuffix(".weight")] = None
    if not found:
        raise ValueError(f"no linear operation of a {stands_for(traced).__name__} feeds the {role} of an attention")
    return list(found)
