"""The code that a call of a module runs: that of its class, or its patched forward's."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from graphpeft.code.source import functions_called, values_around
from graphpeft.graph import in_place
from graphpeft.graph.hosts.patched_forwards import patched_forward


def class_of_forward(module: nn.Module) -> type:
    """Returns a class for readers of code, whose forward is what a call of `module` runs."""
    cls = in_place.original_class(module)
    forward = patched_forward(module)
    if forward is None:
        return cls
    # torch.compile hides what it compiles
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    is_method = isinstance(forward, types.MethodType) and forward.__self__ is module
    function = forward.__func__ if is_method else staticmethod(forward)
    return cls if function is cls.forward else in_place.quiet_subclass(cls, {"forward": function})


def holds_own_tensor(module: nn.Module) -> bool:
    """Returns whether a module's patched forward has a tensor of it in hand, whatever is read in its place."""
    forward = patched_forward(module)
    if forward is None:
        return False
    own = {
        id(tensor) for inner in module.modules() for tensor in (*inner._parameters.values(), *inner._buffers.values())
    }
    return any(id(tensor) in own for tensor in _in_hand(forward))


def _in_hand(forward: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors that a function has in closures, defaults and bound arguments, also in containers there."""
    waiting: list[Any] = []
    for function in functions_called([forward]):
        waiting += [values_around(function), function.__defaults__, function.__kwdefaults__]
    while isinstance(forward, functools.partial):
        waiting += [forward.args, forward.keywords]
        forward = forward.func
    waiting = [part for values in waiting if values for part in (values.values() if type(values) is dict else values)]
    seen: dict[int, Any] = {}
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) in (tuple, list, dict) and id(value) not in seen:
            seen[id(value)] = value
            waiting += value.values() if type(value) is dict else value
