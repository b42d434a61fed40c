"""Regions under ``torch.autocast`` in a graph: a node where each begins, and one where it ends.

A run that raises inside of a region, as a guard does, leaves none of its settings behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from graphpeft._torch import enter_autocast, leave_autocast

__all__ = ["closing_regions", "enter_autocast", "leave_autocast"]


def closing_regions(graph: fx.Graph, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the compiled `forward` of `graph` as one that ends its regions when it raises."""
    if not any(node.target is enter_autocast for node in graph.nodes):
        return forward

    # a region around it would do that, but regions share the casts of weights with those that they are in
    @functools.wraps(forward)
    def close(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except BaseException as error:
            _leave_open_regions(error)
            raise

    return close


def _leave_open_regions(error: BaseException) -> None:
    inside = error.__traceback__.tb_next if error.__traceback__ is not None else None
    # generated code forgets each value after its last use: the regions that it still has are those it hasn't left
    values = list(inside.tb_frame.f_locals.values()) if inside is not None else []
    for region in reversed([value for value in values if isinstance(value, torch.autocast)]):
        leave_autocast(region)
