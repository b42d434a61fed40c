"""Records the begin and end of a forward's regions under ``torch.enable_grad()``, see `regions`."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from graphpeft.graph.contexts import enter_gradients, leave_gradients
from graphpeft.tracing.exchanges import Exchanges
from graphpeft.tracing.recorder import Recorder


class GradientRegions:
    """The open ``torch.enable_grad()`` regions of a recording, outermost first."""

    def __init__(self) -> None:
        self.inside: list[tuple[Any, fx.Proxy]] = []

    @property
    def are_open(self) -> bool:
        """Whether any region is open."""
        return bool(self.inside)


def record_gradient_regions(tracer: Recorder, exchanges: Exchanges) -> GradientRegions:
    """Records the begin and end of regions under ``torch.enable_grad()`` and ``torch.set_grad_enabled(True)``."""
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
