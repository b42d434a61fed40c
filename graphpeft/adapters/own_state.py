"""Loads state dicts into adapted modules whose class loads its own tensors itself.

Such a class may call all other keys below its prefix unexpected, and those of adapters' holders are below it. While an
adapter is at such a module, a layer takes these out of the report again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from graphpeft.graph import in_place
from graphpeft.graph.holders import CONTAINERS, Holder, container_layer


def expect_holders(module: nn.Module) -> None:
    """Makes a module's class expect holders: keys of adapters in a state dict, and members of a container."""
    cls: Any = in_place.original_class(module)
    if cls._load_from_state_dict is not nn.Module._load_from_state_dict:
        in_place.put_on(module, _layer())
    if issubclass(cls, CONTAINERS):
        in_place.put_on(module, container_layer(cls))


def forget_holders(module: nn.Module) -> None:
    """Takes that back, if the module has no adapter any more."""
    if not any(isinstance(child, Holder) for child in module._modules.values()):
        in_place.exchange(module, {"saving": None, "members": None})


@functools.cache
def _layer() -> in_place.Layer:
    return in_place.Layer("saving", (), {"_load_from_state_dict": _load}, (_layer, ()))


def _load(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    with in_place.without(module, "saving"):
        module._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
    of_adapters = tuple(f"{prefix}{name}." for name, child in module._modules.items() if isinstance(child, Holder))
    unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(of_adapters)]
