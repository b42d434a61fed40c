"""Reuses example values of earlier recordings of the same forward.

A forward is recorded a second time if it decides on its mode, or if it sets state on its modules. Most calls are then
the same, on the same example values. Looking up their results saves time, since running a kernel on fake tensors is the
most expensive part of recording a node.
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
        key: The identity of the call: its target, its tensors and numbers, and PyTorch's settings.
        given: The argument values. The key holds only their ids, so they must be kept alive.
    """

    key: Hashable
    given: tuple[Any, ...]


class KnownValues:
    """Results of calls in earlier recordings. A recording uses each result once, since two calls make two tensors."""

    def __init__(self) -> None:
        self._earlier: dict[Hashable, list[tuple[Call, Any]]] = {}
        self._now: list[tuple[Call, Any]] = []

    def begin(self) -> None:
        """Starts another recording, which can use all results so far."""
        for call, value in reversed(self._now):
            self._earlier.setdefault(call.key, []).append((call, value))
        self._now = []

    def forget(self) -> None:
        """Forgets all results, since a write has changed one of their tensors."""
        self.__init__()

    def take(self, call: Call) -> list[Any]:
        """Returns the result of the same call as a list of one value, or an empty list if there is none."""
        values = self._earlier.get(call.key)
        if not values:
            return []
        known = values.pop()
        self._now.append(known)
        return [known[1]]

    def note(self, call: Call, value: Any) -> None:
        """Stores the result of a call."""
        if _key(value) is not None:
            self._now.append((call, value))


def call_of(node: fx.Node, layer: nn.Module | None) -> Call | None:
    """Returns the call of a node on its example values, or None if no key identifies the call."""
    arguments = _key((node.args, node.kwargs))
    # dropout returns its input itself in evaluation, but a new tensor in training
    if arguments is None or isinstance(layer, _DROPOUTS):
        return None
    own = () if layer is None else tuple(map(id, (*layer._parameters.values(), *layer._buffers.values())))
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES]
    settings = (torch.is_grad_enabled(), torch.get_default_dtype(), *autocast)
    given = tuple(argument.meta[VALUE] for argument in node.all_input_nodes)
    return Call((node.target, arguments, own, settings), given)


def _key(value: Any) -> Hashable | None:
    """Returns a key that identifies a value, or None if the value is mutable or of an unknown type."""
    if isinstance(value, fx.Node):
        return _key(value.meta[VALUE])
    if type(value) is fake_tensor.FakeTensor:
        return id(value)
    if type(value) in _PLAIN:
        return (type(value), value)
    if type(value) in (list, dict):
        return None  # the recorded code may change it; those in a node's arguments are of other types
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
    """Returns the metadata of a fake tensor that an in-place write can change."""
    if not isinstance(value, torch.Tensor):
        return ()
    return (value.shape, value.stride(), value.storage_offset(), value.dtype, value.requires_grad)
