"""The layers that an exported program names in ``nn_module_stack``, by which quantisers find what they quantise.

An export without Dynamo leaves out the calls of graph modules. Here the products in a graph are noted as calls of
layers, as in PEFT: the layer's own one by its path, and each with an adapter's tensor by the path of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from graphpeft._torch import module_stack_tracer
from graphpeft.graph import in_place
from graphpeft.graph.holders import Holder
from graphpeft.graph.paths import join
from graphpeft.graph.template import GraphForward

_LAYERS: dict[Any, type[nn.Module]] = {
    F.linear: nn.Linear,
    torch.conv1d: nn.Conv1d,
    torch.conv2d: nn.Conv2d,
    torch.conv3d: nn.Conv3d,
}
"""The layers of PyTorch whose calls are products with a weight."""


def with_exported_layers(call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a call of a model during which a running export notes the layers in graphs."""
    tracer = module_stack_tracer()
    if tracer is None:
        return call

    def noting(*args: Any, **kwargs: Any) -> Any:
        own, before = tracer.call_module, vars(tracer).get("call_module")

        def call_module(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if not isinstance(module, GraphForward) or module not in tracer.submodule_paths:
                return own(module, forward, args, kwargs)
            with _Products(tracer, module):
                if isinstance(module, tuple(_LAYERS.values())):
                    return forward(*args, **kwargs)
                return fx.Tracer.call_module(tracer, module, forward, args, kwargs)

        tracer.call_module = call_module
        try:
            return call(*args, **kwargs)
        finally:
            del tracer.call_module
            if before is not None:  # the model is inside of another adapted one
                tracer.call_module = before

    return noting


class _Products(TorchFunctionMode):
    """Notes the products with a module's tensors as calls of layers."""

    def __init__(self, tracer: Any, module: nn.Module) -> None:
        super().__init__()
        self._tracer, self._module = tracer, module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = self._layer(func, args[1] if len(args) > 1 else kwargs.get("weight"))
        if found is None:
            return func(*args, **kwargs)
        path, _ = found
        calls = self._tracer.num_calls.get(path, 0)
        self._tracer.num_calls[path] = calls + 1
        self._tracer.module_stack[f"{path}@{calls}" if calls else path] = found
        try:
            return func(*args, **kwargs)
        finally:
            self._tracer.module_stack.popitem()

    def _layer(self, func: Any, weight: Any) -> tuple[str, type[nn.Module]] | None:
        """Returns the path and the class of the layer that a function with a weight is."""
        if func not in _LAYERS:
            return None
        outer = self._tracer.submodule_paths[self._module]
        if isinstance(self._module, _LAYERS[func]) and self._module._parameters.get("weight") is weight:
            return outer, in_place.original_class(self._module)
        for name, holder in self._module._modules.items():
            if isinstance(holder, Holder):
                paths = (path for path, tensor in holder.named_parameters() if tensor is weight)
                if (path := next(paths, None)) is not None:
                    return join(join(outer, name), path), _LAYERS[func]
        return None
