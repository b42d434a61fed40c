"""Regions of a graph under ``torch.autocast`` and ``torch.enable_grad()``: one node enters, one node leaves a region.

A graph may run without gradients; a region under ``torch.enable_grad()`` has them nevertheless. For regions under
``torch.no_grad()`` see `no_grad`.

A run that raises inside a region, as a guard does, undoes the region's settings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch.fx.node import has_side_effect

from graphpeft._torch import enter_autocast, leave_autocast

__all__ = ["closing_regions", "enter_autocast", "enter_gradients", "leave_autocast", "leave_gradients"]


class GradientRegion(NamedTuple):
    """A region with gradients.

    Attributes:
        were_on: Whether gradients were on before the region.
    """

    were_on: bool


# without these marks, fx's dead code elimination would drop the calls
@has_side_effect
def enter_gradients() -> GradientRegion:
    """Enters a region with gradients."""
    region = GradientRegion(torch.is_grad_enabled())
    torch.set_grad_enabled(True)
    return region


@has_side_effect
def leave_gradients(region: GradientRegion) -> None:
    """Leaves a region with gradients."""
    torch.set_grad_enabled(region.were_on)


def closing_regions(graph: fx.Graph, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the compiled `forward` of `graph`, wrapped so that an exception leaves its open regions."""
    if not any(node.target in (enter_autocast, enter_gradients) for node in graph.nodes):
        return forward

    # an outer autocast region would restore the settings too, but regions inside it would share its cache of weights
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
    # generated code deletes each value after its last use, so the regions among its local variables are open
    values = list(inside.tb_frame.f_locals.values()) if inside is not None else []
    for region in reversed([value for value in values if isinstance(value, torch.autocast | GradientRegion)]):
        if isinstance(region, torch.autocast):
            leave_autocast(region)
        else:
            leave_gradients(region)
