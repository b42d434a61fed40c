"""Patches of ``nn.Module`` during a trace: attribute reads, attribute assignments and conversions."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import DisableTorchFunction
from graphpeft.graph.errors import TraceError
from graphpeft.tracing import no_grad
from graphpeft.tracing.attributes import noting_reads, plain_or_proxy
from graphpeft.tracing.exchanges import Exchanges
from graphpeft.tracing.recorder import Recorder


def exchange_of_modules(tracer: Recorder, root: nn.Module, exchanges: Exchanges) -> None:
    """Patches ``nn.Module`` to report attribute reads, assignments and conversions of `root`'s modules to `tracer`."""
    exchanges.attribute(nn.Module, "training", _training(tracer, root), create=True)
    exchanges.attribute(nn.Module, "__getattribute__", noting_reads(tracer, root))
    exchanges.attribute(nn.Module, "__setattr__", _noted_assignment(tracer, root))
    exchanges.attribute(nn.Module, "_apply", _refused_conversion(tracer, root))


def _training(tracer: Recorder, root: nn.Module) -> property:
    paths = {id(module): path for path, module in root.named_modules()}

    def get(module: nn.Module) -> Any:
        path = paths.get(id(module))
        if path is None or not tracer.is_of_this_thread:
            return module.__dict__["training"]
        value = tracer.session.mode_of(module)
        if tracer.is_running:
            return value
        return plain_or_proxy(tracer, module, f"{path}.training" if path else "training", value)

    def put(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    return property(get, put)


def _noted_assignment(tracer: Recorder, root: nn.Module) -> Callable[..., None]:
    assign = nn.Module.__setattr__
    modules = set(map(id, root.modules()))

    def note(module: nn.Module, name: str, value: Any) -> None:
        if not tracer.is_running and id(module) in modules:
            if name in module._modules and module._modules[name] is value:
                return
            # `self.steps += 1` writes into the tensor that it assigns
            if builtins.isinstance(value, fx.Proxy) and _is_written_attribute(tracer, module, name, value):
                return
            # a module that stays a call runs as a copy, so the graph would lose the assignment
            owned = {**module._parameters, **module._modules, "training": True}
            if (
                tracer.session.keeps_whole(module)
                or name in owned
                or builtins.isinstance(value, nn.Parameter | nn.Module)
            ):
                message = f"{type(module).__name__}'s forward assigns self.{name}, which a graph can't hold"
                raise tracer.failing(TraceError(message))
            tracer.note_assignment(module, name)
        assign(module, name, cast(Any, value))

    return note


def _is_written_attribute(tracer: Recorder, module: nn.Module, name: str, value: fx.Proxy) -> bool:
    """Returns whether `value` is the tensor in the module's attribute `name`, after in-place writes."""
    held = module._buffers.get(name, module._parameters.get(name, module.__dict__.get(name)))
    path = tracer.session.name_of(held) if builtins.isinstance(held, torch.Tensor) else None
    return path is not None and no_grad.is_written(value, path)


def _refused_conversion(tracer: Recorder, root: nn.Module) -> Callable[..., nn.Module]:
    convert = nn.Module._apply
    modules = set(root.modules())

    def refuse(module: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
        if tracer.is_running or module not in modules:
            return convert(module, function, *args, **kwargs)
        tensors = (*module.parameters(), *module.buffers())
        with DisableTorchFunction():
            is_converted = any(function(tensor) is not tensor for tensor in tensors)
        if is_converted:
            message = f"a {type(module).__name__} is converted in a forward, which a graph can't hold"
            raise tracer.failing(TraceError(message))
        return module

    return refuse
