"""What is exchanged in PyTorch and in the model while a trace runs, and put back after it.

Functions that make tensors from numbers don't ask their arguments' ``__torch_function__`` and must make new ones in
each run, ``Module.training`` is a plain attribute, and assigning to a module would change it: for the time of a trace these
go through the tracer.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.fx as fx
from torch import nn

from graphpeft.tracing import masks
from graphpeft.tracing.errors import TraceError
from graphpeft.tracing.graph_module import VALUE

if TYPE_CHECKING:
    from graphpeft.tracing.tracer import ValueTracer

_FACTORIES = (
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range",
    "tensor", "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
"""Functions of `torch` that make tensors from numbers."""


@contextlib.contextmanager
def recording(tracer: ValueTracer, root: nn.Module) -> Iterator[None]:
    """Sends to `tracer` what `fx` alone can't see while `root` is traced; `root` is afterwards as it was."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_unchanged(root))
        for name in _FACTORIES:
            function = getattr(torch, name)
            stack.enter_context(mock.patch.object(torch, name, _recorded(tracer, function, function)))
        stack.enter_context(mock.patch.object(nn.Module, "training", _training(tracer, root), create=True))
        stack.enter_context(mock.patch.object(nn.Module, "__setattr__", _refused_assignment(tracer)))
        stack.enter_context(mock.patch.object(builtins, "isinstance", _truthful_isinstance()))
        stack.enter_context(mock.patch.object(torch.autocast, "__enter__", _refused_autocast(tracer)))
        for module, name in masks.mask_functions_seen_by(root):
            recorded = _recorded(tracer, getattr(module, name), masks.attention_mask, name)
            stack.enter_context(mock.patch.object(module, name, recorded))
        yield


def _recorded(
    tracer: ValueTracer, function: Callable[..., Any], target: Callable[..., Any], *first: Any
) -> Callable[..., Any]:
    """Returns `function` as one that records a call of `target`, with `first` before its own arguments."""

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_running:
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", target, (*first, *args), kwargs)

    return record


def _truthful_isinstance() -> Callable[[Any, Any], bool]:
    ask = builtins.isinstance

    # a proxy can't answer by its __class__: PyTorch's argument parsers ask for it too, and would read it as a tensor
    def isinstance(instance: Any, classes: Any) -> bool:
        if ask(instance, classes):
            return True
        return ask(instance, fx.Proxy) and VALUE in instance.node.meta and ask(instance.node.meta[VALUE], classes)

    return isinstance


def _training(tracer: ValueTracer, root: nn.Module) -> property:
    paths = {module: path for path, module in root.named_modules()}

    def get(module: nn.Module) -> Any:
        path = paths.get(module)
        if tracer.is_running or path is None:
            return module.__dict__["training"]
        return tracer.attribute(f"{path}.training" if path else "training")

    def put(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    return property(get, put)


def _refused_assignment(tracer: ValueTracer) -> Callable[..., None]:
    assign = nn.Module.__setattr__

    def refuse(module: nn.Module, name: str, value: Any) -> None:
        if not tracer.is_running:
            raise TraceError(f"{type(module).__name__}'s forward assigns self.{name}, which a graph can't hold")
        assign(module, name, value)

    return refuse


def _refused_autocast(tracer: ValueTracer) -> Callable[..., Any]:
    enter = torch.autocast.__enter__

    def refuse(context: Any) -> Any:
        if not tracer.is_running:
            raise TraceError("a region under torch.autocast can't be held by a graph")
        return enter(context)

    return refuse


@contextlib.contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Puts back, at the end, whatever was assigned or cached on the modules of `root`."""
    before = [(module, dict(module.__dict__), _containers(module)) for module in root.modules()]
    try:
        yield
    finally:
        for module, attributes, containers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in containers:
                _refill(container, content)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(value, copy.copy(value)) for value in module.__dict__.values() if isinstance(value, dict | list | set)]


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
