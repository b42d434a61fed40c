"""Saves and loads what adapters have on a module whose class does that for its own tensors alone.

``state_dict()`` and ``load_state_dict()`` go through all parameters of a module, unless its class overrides
``_save_to_state_dict`` or ``_load_from_state_dict``, as PyTorch Geometric's layers do. Such a module wears a layer that
adds what is of adapters, and lets the class do as it does for the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from graphpeft.graph import in_place, overrides


def add(module: nn.Module, names: Collection[str]) -> None:
    """Lets a module save and load tensors of adapters, by their names, if its class doesn't."""
    if _has_own_way(in_place.original_class(module)):
        in_place.put_on(module, _layer(tuple(dict.fromkeys((*_names(module), *names)))))


@functools.lru_cache(maxsize=256)
def _has_own_way(cls: Any) -> bool:
    methods = ("_save_to_state_dict", "_load_from_state_dict")
    return any(getattr(cls, method) is not getattr(nn.Module, method) for method in methods)


def discard(module: nn.Module, names: Collection[str]) -> None:
    """Lets a module no longer save and load these."""
    left = tuple(name for name in _names(module) if name not in names)
    if left:
        in_place.put_on(module, _layer(left))
    else:
        in_place.take_off(module, "saving")


def _names(module: nn.Module) -> tuple[str, ...]:
    return getattr(type(module), "_graphpeft_own_state", ())


@functools.lru_cache(maxsize=256)
def _layer(names: tuple[str, ...]) -> in_place.Layer:
    namespace = {"_graphpeft_own_state": names, "_save_to_state_dict": _save, "_load_from_state_dict": _load}
    return in_place.Layer("saving", (), namespace, (_layer, (names,)))


def _save(module: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    # the class's own may read attributes, in whose place an adapter has others
    itself: Any = overrides.with_tensors(module, {})
    itself._save_to_state_dict(destination, prefix, keep_vars)
    for name in _names(module):
        tensor = overrides.tensor_of(module, name)
        destination[prefix + name] = tensor if keep_vars else tensor.detach()


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
    names, like_any = _names(module), nn.Module()
    keys = {prefix + name for name in names}
    with in_place.without(module, "saving"):
        module._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
    kinds = ("_parameters", "_buffers")
    for kind in kinds:
        like_any.__dict__[kind].update({name: held for name, held in vars(module)[kind].items() if name in names})
    missing: list[str] = []
    errors: list[str] = []
    given = {key: value for key, value in state_dict.items() if key in keys}
    like_any._load_from_state_dict(given, prefix, local_metadata, strict, missing, [], errors)
    for kind in kinds:
        vars(module)[kind].update(vars(like_any)[kind])  # others, if they are assigned
    # the class may have told of them already
    missing_keys += [key for key in missing if key not in missing_keys]
    unexpected_keys[:] = [key for key in unexpected_keys if key not in keys]
    error_msgs += [error for error in errors if error not in error_msgs]
