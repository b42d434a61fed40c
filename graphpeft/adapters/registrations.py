"""Refuses an assignment that puts another module in the place of one with adapters.

PyTorch calls a hook for each module that becomes an attribute of another one, in whatever model. So no class of a
module around adapters has to change for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph import in_place
from graphpeft.graph.holders import Holder, adapters_at, tree_of
from graphpeft.graph.paths import join, modules_by_path, unwrapped
from graphpeft.graph.template import names_in_slots

_HOOKS: list[Any] = []

PLACES = [0]
"""The number of modules with adapters that this process has registered at a place, once some were copied."""


def watch() -> None:
    """Begins to refuse such assignments, with the first model that is adapted."""
    if not _HOOKS:
        _HOOKS.append(register_module_module_registration_hook(_registered))


def _registered(parent: nn.Module, name: str, new: Any) -> None:
    """Raises AdaptError if `new` comes in the place of a module with adapters that it hasn't."""
    if torch.compiler.is_compiling():
        return  # a list that code has made of a part of another one
    if in_place.COPIES[0] and new is not None and any(isinstance(each, in_place.Dressed) for each in tree_of(new)):
        PLACES[0] += 1
    modules = vars(parent).get("_modules")
    old = modules.get(name) if isinstance(modules, dict) else None
    if isinstance(old, nn.Dropout) and isinstance(parent, Holder) and not isinstance(new, nn.Dropout):
        raise AdaptError(
            f"{name} of an adapter is an nn.Dropout, and is to be a {type(new).__name__}; set its p to 0 instead"
        )
    if old is None or old is new:
        return
    # not by named_modules, which a class may override
    inside = {} if new is None else modules_by_path(new)
    if any(module is old or module is unwrapped(old) for module in inside.values()):
        return  # a new module around the old one leaves the adapters where they act
    left, kept = _adapters_in(inside), {id(module) for module in inside.values()}
    before = _adapters_in(modules_by_path(old)).items()
    # a module that was only moved has its adapters with it
    lost = next((place for place, module in before if place not in left and id(module) not in kept), None)
    if lost is not None:
        raise AdaptError(
            f"adapter {lost[1]!r} is on {join(name, lost[0])} in a {in_place.original_class(parent).__name__}, which "
            "would be exchanged without it: exchange it before you adapt the model, or take the adapters off first "
            "with unload() or merge_and_unload()"
        )


def _adapters_in(modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], nn.Module]:
    """Returns the module of each place of an adapter, a path and its name, but for those in adapted models there."""
    found: dict[tuple[str, str], nn.Module] = {}
    whole = [path for path, each in modules.items() if _is_adapted_model(each)]
    for path, each in modules.items():
        if any(path == one or not one or path.startswith(f"{one}.") for one in whole):
            continue
        names = (*adapters_at(each), *names_in_slots(each).values())
        found.update(dict.fromkeys(((path, name) for name in names), each))
    return found


def _is_adapted_model(module: nn.Module) -> bool:
    # others may have exchanged its class since
    return "_peft_adapters" in vars(module)
