"""Hides holders from the code of the modules in which they are: from containers, and from classes that load themselves.

An ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict`` counts its submodules, and goes through them. A class that
overrides ``_load_from_state_dict`` may call the keys of adapters unexpected. While an adapter is at such a module, its
class has a layer with methods that leave holders out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from graphpeft.graph import in_place
from graphpeft.graph.holders import Holder, has_holders

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_MEMBERS = ("__len__", "__iter__", "__getitem__", "__contains__", "keys", "values", "items")
"""Methods by which code goes through the members of a container."""


def hide_holders(module: nn.Module) -> None:
    """Hides the holders at a module from its own code, if that may see them."""
    layer = _layer(in_place.original_class(module))
    if layer is not None:
        in_place.put_on(module, layer)


def stop_hiding(module: nn.Module) -> None:
    """Takes that back, if no adapter is at the module any more."""
    if not has_holders(module):
        in_place.take_off(module, "hiding")


@functools.lru_cache(maxsize=256)
def _layer(cls: Any) -> in_place.Layer | None:
    names = [name for name in _MEMBERS if issubclass(cls, _CONTAINERS) and hasattr(cls, name)]
    methods: dict[str, Any] = {name: _on_own_members(getattr(cls, name)) for name in names}
    if cls._load_from_state_dict is not nn.Module._load_from_state_dict:
        methods["_load_from_state_dict"] = _load
    return in_place.Layer("hiding", (), methods, (_layer, (cls,))) if methods else None


def _on_own_members(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method of a container that runs on an object like the container, without holders."""

    @functools.wraps(method)
    def on_own_members(module: nn.Module, *args: Any) -> Any:
        seen = object.__new__(in_place.original_class(module))
        own = {name: child for name, child in module._modules.items() if not isinstance(child, Holder)}
        vars(seen).update({**vars(module), "_modules": own})
        return method(seen, *args)

    return on_own_members


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
    with in_place.without(module, "hiding"):
        module._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
    of_adapters = tuple(f"{prefix}{name}." for name, child in module._modules.items() if isinstance(child, Holder))
    unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(of_adapters)]
