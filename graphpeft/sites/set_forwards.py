"""Tells whether a forward that was set on a layer computes what the layer's class does.

Only then is a change of the weight the same as a branch beside the forward, and can be merged.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from graphpeft.graph import in_place
from graphpeft.graph.errors import TraceError
from graphpeft.graph.kept_forwards import set_forward
from graphpeft.tracing.graph_equality import checks_all_of, equivalent
from graphpeft.tracing.lift import lift_forward


def computes_otherwise(module: nn.Module) -> str | None:
    """Returns why a change of the weight may not be what an adapter adds beside a set forward; None if it is."""
    forward = set_forward(module)
    if forward is None:
        return None
    # torch.compile hides what it compiles
    compiled = getattr(forward, "_torchdynamo_orig_callable", forward)
    of_class = types.MethodType(in_place.original_class(module).forward, module)
    if compiled == of_class:
        return None
    try:
        own, other = (lift_forward(module, _of_one(each)).graphs for each in (of_class, compiled))
    except TraceError as error:
        return f"and no graph shows that it computes what the class of the layer does ({error})"
    if len(own) == len(other) == 1 and _same(own[0], other[0]):
        return None
    return "and computes something else than the class of the layer"


def _of_one(forward: Callable[..., Any]) -> Callable[[Any], Any]:
    def with_one_argument(x: Any) -> Any:
        return forward(x)

    return with_one_argument


def _same(graph: fx.Graph, other: fx.Graph) -> bool:
    return equivalent(graph, other, {}) and checks_all_of(graph, other, lambda _: False)
