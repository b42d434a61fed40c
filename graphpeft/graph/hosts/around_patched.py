"""Graphs around a patched forward, as trl patches that of the model that it trains.

A prompt changes the arguments of a forward. A patched forward may run the layers itself, and never call the one
that it replaced. So the graph runs around it: where the graph calls the forward of the module's class, the module is
called, with its hooks and the patched forward. If that calls what it replaced, the forward of the class runs, since the
arguments are changed by then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from graphpeft.graph import in_place
from graphpeft.graph.call_values import PerCall
from graphpeft.graph.hosts.patched_forwards import run_patched_forward

_AROUND: PerCall[nn.Module] = PerCall("model that runs around its patched forward", "call the model outside of tasks")

around = _AROUND.during
"""Returns a context in which the graph of a module, which is to be called there, runs around the patched forward."""


def is_around(module: nn.Module) -> bool:
    """Returns whether the graph of `module` runs around the present code."""
    return _AROUND.get() is module


def own_forward(module: nn.Module) -> functools.partial[Any]:
    """Returns what the graph of a module calls as the module's own forward: that of its class, or one set before."""
    known = run_patched_forward(module)
    if known is not None:
        return known
    cls: Any = in_place.original_class(module)
    run: Callable[..., Any] = cls.__call__ if is_around(module) else cls.forward
    return functools.partial(run, module)
