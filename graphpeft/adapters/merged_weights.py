"""Refuses to load other weights into modules whose weights hold merged adapters, since unmerging would lose them.

``load_state_dict`` of the adapted model checks all weights before it loads one. ``load_state_dict`` of a module around
the model, or inside of it, calls ``_load_from_state_dict`` of each module, which checks the weights of that module.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Modules
from graphpeft.adapters.tensors import is_same
from graphpeft.graph import in_place
from graphpeft.graph.overrides import own_parameter


def guard(modules: Modules, places: Iterable[tuple[str, str]]) -> None:
    """Lets modules refuse other values of weights, given by their modules' paths and their names."""
    names: dict[str, list[str]] = {}
    for path, name in places:
        names.setdefault(path, []).append(name)
    for path, guarded in names.items():
        in_place.put_on(modules[path], _layer(tuple(guarded)))


def release(modules: Modules, places: Iterable[tuple[str, str]]) -> None:
    """Lets modules load any weights again."""
    for path in dict.fromkeys(path for path, _ in places):
        if path in modules:
            in_place.take_off(modules[path], "merged")


def refuse_others(module: nn.Module, names: Iterable[str], prefix: str, state_dict: Mapping[str, Any]) -> None:
    """Raises AdaptError if a state dict has others than the merged weights of a module, whose keys have the prefix."""
    for name in names:
        value = state_dict.get(prefix + name)
        if value is not None and not is_same(own_parameter(module, name), value):
            raise AdaptError(
                f"the state dict has another {prefix + name} than the one into which adapters are merged, and "
                "unmerging would lose it; call unmerge_adapter() before you load it"
            )


@functools.lru_cache(maxsize=256)
def _layer(names: tuple[str, ...]) -> in_place.Layer:
    namespace = {"_graphpeft_merged": names, "_load_from_state_dict": _load}
    return in_place.Layer("merged", (), namespace, (_layer, (names,)))


def _load(module: Any, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    refuse_others(module, module._graphpeft_merged, prefix, state_dict)
    with in_place.without(module, "merged"):
        module._load_from_state_dict(state_dict, prefix, *args)
