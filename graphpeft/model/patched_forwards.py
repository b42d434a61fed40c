"""Calls of an adapted model whose forward other code has patched, as trl does to compute losses in parts.

Adapters of layers act in it, whether it calls the layers or reads their weights. A graph around the whole forward runs
around the patched one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphpeft.graph.hosts.around_patched import around
from graphpeft.graph.hosts.patched_forwards import newly_patched_forward
from graphpeft.graph.template import graph_forward, worn_template


def with_patched_forward(model: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `call`, by which a model is called, such that adapters act in the model's patched forward."""
    return call if newly_patched_forward(model) is None else _Called(model, call)


class _Called:
    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self._model, self._call = model, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, template = self._model, worn_template(self._model)
        if template is None or not template.calls_own_forward:
            return self._call(*args, **kwargs)
        forward: Any = graph_forward(model)
        with around(model):
            return forward(model, *args, **kwargs)
