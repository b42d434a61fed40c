"""The weights into which adapters are merged: what else changes there meanwhile is kept, or refused.

A module notes the bits of its weights as they are with the adapters, so that a weight which was trained, written or
assigned since can be told. ``W + ΔW`` became ``V``, so the weight without the adapters is ``V - ΔW``, as in PEFT; while
nothing has changed, it is the kept ``W``, bit for bit. A cast changes the bits and nothing else, so it notes them anew.

``load_state_dict`` of the adapted model checks all weights before it loads one. ``load_state_dict`` of a module around
the model, or inside of it, calls ``_load_from_state_dict`` of each module, which checks the weights of that module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.changes import asks_of_weights, bias_delta, bias_place, changing_sites, delta
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapters, Modules, Tensors
from graphpeft.adapters.tensors import fingerprint, is_same
from graphpeft.graph import in_place
from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.paths import join, modules_by_path
from graphpeft.graph.sharding import whole
from graphpeft.graph.values import loaded
from graphpeft.rules.rule import changes_bias
from graphpeft.transaction import delete_item, set_item

_BITS = "_graphpeft_merged"
"""The fingerprints of a module's weights, by their names; None for codes, which nothing trains."""


def guard(modules: Modules, adapters: Adapters) -> None:
    """Notes the bits of weights into which adapters have just been merged; their modules refuse to load others."""
    coded = [(path, "weight") for path in adapters.codes]
    for path, name in (*adapters.originals, *coded):
        module = modules[path]
        in_place.put_on(module, _LAYER)
        _note(module, {name: None if (path, name) in coded else _bits(module, name)})


def release(modules: Modules, adapters: Adapters) -> None:
    """Lets modules load any weights again."""
    for path in dict.fromkeys([*(path for path, _ in adapters.originals), *adapters.codes]):
        if path in modules:
            in_place.take_off(modules[path], "merged")
            delete_item(vars(modules[path]), _BITS)


def originals(modules: Modules, adapters: Adapters) -> Tensors:
    """Returns the weights without the merged adapters, but with what has changed since these were merged.

    Raises:
        AdaptError: If a weight has changed, and the change that an adapter made of it depends on the weight itself.
    """
    for path, name in list(adapters.originals):
        if path in modules and _is_changed(modules[path], name):
            set_item(adapters.originals, (path, name), _without_adapters(modules, adapters, path, name))
            _note(modules[path], {name: _bits(modules[path], name)})
    return adapters.originals


def originals_of(model: nn.Module, adapters: Adapters | None) -> Tensors:
    """Returns the same for the adapters of a model, whose modules are looked for only if any are merged."""
    return originals(modules_by_path(model), adapters) if adapters is not None and adapters.originals else {}


def refuse_others(module: nn.Module, names: Iterable[str], prefix: str, state_dict: Mapping[str, Any]) -> None:
    """Raises AdaptError if a state dict has others than the merged weights of a module, whose keys have the prefix."""
    for name in names:
        value = state_dict.get(prefix + name)
        if value is not None and not is_same(own_parameter(module, name), value):
            raise AdaptError(
                f"the state dict has another {prefix + name} than the one into which adapters are merged, and "
                "unmerging would lose it; call unmerge_adapter() before you load it"
            )


def _note(module: nn.Module, bits: dict[str, int | None]) -> None:
    noted = vars(module).get(_BITS, {})
    if not bits.items() <= noted.items():
        set_item(vars(module), _BITS, {**noted, **bits})


def _bits(module: nn.Module, name: str) -> int | None:
    with loaded(module, name):
        return fingerprint(whole(own_parameter(module, name).detach()))


def _is_changed(module: nn.Module, name: str) -> bool:
    noted = vars(module).get(_BITS, {}).get(name)
    return noted is not None and _bits(module, name) != noted


@torch.no_grad()
def _without_adapters(modules: Modules, adapters: Adapters, path: str, name: str) -> torch.Tensor:
    """Returns a weight from which the changes that adapters make are taken."""
    with loaded(modules[path], name):
        left = whole(own_parameter(modules[path], name).detach()).clone()
    for merged in adapters.merged:
        for adapted in changing_sites(modules, adapters.by_name[merged]):
            change = _change_of(adapted, modules, path, name)
            if change is None:
                continue
            if asks_of_weights(adapted.rule):
                raise AdaptError(
                    f"{join(path, name)} has changed since {merged!r} was merged into it, and the change that "
                    f"{merged!r} makes depends on the weight itself, so it can't be taken out; merge_and_unload() "
                    "leaves the weights as they are now, with the adapters in them"
                )
            left -= change.to(left.dtype)
    return left


def _change_of(adapted: Any, modules: Modules, path: str, name: str) -> torch.Tensor | None:
    """Returns the change that an adapter's site makes of a weight, or None."""
    if (adapted.site.owner, adapted.site.attribute) == (path, name):
        return delta(adapted, modules)
    has_bias = changes_bias(adapted.rule) and adapted.site.bias is not None
    return bias_delta(adapted, modules) if has_bias and bias_place(adapted) == (path, name) else None


def _load(module: Any, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    refuse_others(module, vars(module)[_BITS], prefix, state_dict)
    with in_place.without(module, "merged"):
        module._load_from_state_dict(state_dict, prefix, *args)


def _apply(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Casts and moves a module's tensors, and notes the bits of what had not changed before."""
    noted = {name: bits for name, bits in vars(module)[_BITS].items() if bits is not None}
    unchanged = [name for name in noted if not _is_changed(module, name)]
    with in_place.without(module, "merged"):
        module._apply(*args, **kwargs)
    _note(module, {name: _bits(module, name) for name in unchanged})
    return module


def _layer() -> in_place.Layer:
    return _LAYER


_LAYER = in_place.Layer("merged", (), {"_load_from_state_dict": _load, "_apply": _apply}, (_layer, ()))
