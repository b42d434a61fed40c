"""Records where a forward's regions under ``torch.enable_grad()`` begin and end, see `regions`."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from graphpeft.graph.contexts import enter_gradients, leave_gradients
from graphpeft.tracing.exchanges import Exchanges
from graphpeft.tracing.recorder import Recorder


class GradientRegions:
    """The regions with gradients in which a recording is."""

    def __init__(self) -> None:
        self.inside: list[tuple[Any, fx.Proxy]] = []

    @property
    def are_open(self) -> bool:
        """Whether it is in any."""
        return bool(self.inside)


def record_gradient_regions(tracer: Recorder, exchanges: Exchanges) -> GradientRegions:
    """Records where regions under ``torch.enable_grad()`` and ``torch.set_grad_enabled(True)`` begin and end."""
    regions = GradientRegions()
    for cls in (torch.enable_grad, torch.set_grad_enabled):
        _record_regions_of(cls, tracer, exchanges, regions)
    return regions


_are_on = torch.is_grad_enabled


def _record_regions_of(cls: Any, tracer: Recorder, exchanges: Exchanges, regions: GradientRegions) -> None:
    enter, leave = cls.__enter__, cls.__exit__

    def record_enter(context: Any) -> None:
        enter(context)
        if not tracer.is_running and _are_on():
            regions.inside.append((context, tracer.create_proxy("call_function", enter_gradients, (), {})))

    def record_leave(context: Any, *error: Any) -> None:
        if not tracer.is_running and regions.inside and regions.inside[-1][0] is context:
            tracer.create_proxy("call_function", leave_gradients, (regions.inside.pop()[1],), {})
        leave(context, *error)

    exchanges.attribute(cls, "__enter__", record_enter)
    exchanges.attribute(cls, "__exit__", record_leave)
