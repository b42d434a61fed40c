"""Calls of an adapted model on which other code has set a forward, as trl sets one that computes losses in parts.

Adapters of layers act in it, if it calls the layers. A graph around the whole forward runs around the set one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.around_set_forwards import around
from graphpeft.graph.kept_forwards import foreign_forward
from graphpeft.graph.template import graph_forward, worn_template


def with_set_forward(model: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `call`, by which a model is called, such that adapters act in a forward that was set on the model.

    The returned function raises AdaptError if the set forward leaves out an adapted layer of the model's outputs.
    """
    return call if foreign_forward(model) is None else _Called(model, call)


class _Called:
    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self._model, self._call = model, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, template = self._model, worn_template(self._model)
        with _refusing_what_leaves_out_the_head(model):
            if template is None or not template.calls_own_forward:
                return self._call(*args, **kwargs)
            forward: Any = graph_forward(model)
            with around(model):
                return forward(model, *args, **kwargs)


@contextlib.contextmanager
def _refusing_what_leaves_out_the_head(model: Any) -> Iterator[None]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    template = None if head is None else worn_template(head)
    if head is None or template is None or not template.slots or torch.compiler.is_compiling():
        yield
        return
    calls: list[bool] = []
    hook = head.register_forward_pre_hook(lambda *_: calls.append(True))
    try:
        yield
    finally:
        hook.remove()
    if not calls:
        (path,) = (path for path, module in model.named_modules() if module is head)
        raise AdaptError(
            f"an adapter acts in {path}, which the forward that was set on the model doesn't call. It may read "
            f"{path}.weight itself, as trl's trainers do, so the adapter would have no effect: leave {path!r} out of "
            "target_modules, or train it by modules_to_save"
        )
