"""Example values that an earlier recording of the same forward has computed.

A forward is recorded a second time where its mode decides, or where it leaves something on its modules. Most calls are
the same again, on the same example values. What they give is looked up then, since a kernel on fake tensors costs more
than all else about a node.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import fake_tensor
from graphpeft.graph.template import VALUE

_PLAIN = (bool, int, float, complex, str, type(None), type(...), torch.Size, torch.dtype, torch.device)
_DEVICES = ("cpu", "cuda")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Call(NamedTuple):
    """A call on example values.

    Attributes:
        key: What tells it from others: what is called, on which tensors and numbers, under which settings.
        given: The values of its arguments, which are kept since the key has but their identity.
    """

    key: Hashable
    given: tuple[Any, ...]


class KnownValues:
    """What calls gave in earlier recordings. Each value is used once in a recording: two calls give two tensors."""

    def __init__(self) -> None:
        self._earlier: dict[Hashable, list[tuple[Call, Any]]] = {}
        self._now: list[tuple[Call, Any]] = []

    def begin(self) -> None:
        """Begins another recording, in which all that is known so far can be used."""
        for call, value in reversed(self._now):
            self._earlier.setdefault(call.key, []).append((call, value))
        self._now = []

    def forget(self) -> None:
        """Forgets everything, since what was known has changed."""
        self.__init__()

    def take(self, call: Call) -> list[Any]:
        """Returns a list of the value that the same call gave, which is empty if there was none."""
        values = self._earlier.get(call.key)
        if not values:
            return []
        known = values.pop()
        self._now.append(known)
        return [known[1]]

    def note(self, call: Call, value: Any) -> None:
        """Notes what a call gave."""
        if _key(value) is not None:
            self._now.append((call, value))


def call_of(node: fx.Node, layer: nn.Module | None) -> Call | None:
    """Returns the call of a node on its example values, or None if it can't be told from others.

    Args:
        node: The node.
        layer: The layer that it calls, if it calls one.
    """
    arguments = _key((node.args, node.kwargs))
    # in evaluation dropout returns the very tensor that it is given, which isn't what it does in training
    if arguments is None or isinstance(layer, _DROPOUTS):
        return None
    own = () if layer is None else tuple(map(id, (*layer._parameters.values(), *layer._buffers.values())))
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES]
    settings = (torch.is_grad_enabled(), torch.get_default_dtype(), *autocast)
    given = tuple(argument.meta[VALUE] for argument in node.all_input_nodes)
    return Call((node.target, arguments, own, settings), given)


def _key(value: Any) -> Hashable | None:
    """Returns what tells a value from others, or None if that can't be told, or the value can change."""
    if isinstance(value, fx.Node):
        return _key(value.meta[VALUE])
    if type(value) is fake_tensor.FakeTensor:
        return id(value)
    if type(value) in _PLAIN:
        return (type(value), value)
    if isinstance(value, slice):
        parts: Any = (value.start, value.stop, value.step)
    elif isinstance(value, dict):
        parts = (*value, *value.values())
    elif isinstance(value, tuple | list):
        parts = value
    else:
        return None
    keys = tuple(map(_key, parts))
    return None if None in keys else (type(value), *keys)


def facts(value: Any) -> tuple[Any, ...]:
    """Returns what a write can change of a tensor's value in the example."""
    if not isinstance(value, torch.Tensor):
        return ()
    return (value.shape, value.stride(), value.storage_offset(), value.dtype, value.requires_grad)
