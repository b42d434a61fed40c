"""The weights into which adapters are merged: what else changes there meanwhile is kept, or refused.

A module notes the bits of its weights as they are with the adapters, so that a weight which was trained, written or
assigned since can be told. ``W + ΔW`` became ``V``, so the weight without the adapters is ``V - ΔW``, as in PEFT; while
nothing has changed, it is the kept ``W``, bit for bit. A cast changes the bits and nothing else, so it notes them anew.

``load_state_dict`` of the adapted model checks all weights before it loads one. ``load_state_dict`` of a module around
the model, or inside of it, calls ``_load_from_state_dict`` of each module, which checks the weights of that module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft.adapters.changes import asks_of_weights, bias_delta, bias_place, changing_sites, delta
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapters, Modules
from graphpeft.adapters.tensors import fingerprint, is_same
from graphpeft.graph import in_place
from graphpeft.graph.autocast import in_own_precision
from graphpeft.graph.hosts.sharding import is_sharded, whole
from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.paths import join, modules_by_path
from graphpeft.graph.values import loaded, value_of
from graphpeft.rules.rule import changes_bias
from graphpeft.transaction import delete_item, set_attribute, set_item

_BITS = "_graphpeft_merged"
"""The fingerprints of a module's weights, by their names; None for codes, which nothing trains."""


class Originals(Mapping[tuple[str, str], torch.Tensor]):
    """The weights without the merged adapters, for readers: each is worked out when it is asked for.

    Later changes of the merged weights are in them, but for weights that are sharded over processes, since
    one process alone may read.
    """

    def __init__(self, model: nn.Module, adapters: Adapters | None) -> None:
        self._kept = {} if adapters is None else adapters.originals
        self._adapters: Any = adapters
        self._modules = modules_by_path(model) if self._kept else {}

    def __getitem__(self, place: tuple[str, str]) -> torch.Tensor:
        kept, module = self._kept[place], self._modules.get(place[0])
        own = None if module is None else module._parameters.get(place[1])
        if own is None or is_sharded(own):
            return kept
        return self._present.at(*place)[0]

    @functools.cached_property
    def _present(self) -> WithoutMerged:
        return WithoutMerged(self._modules, self._adapters)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


class WithoutMerged:
    """The weights without the merged adapters, but with what has changed since they were merged.

    It is made for one call, in which the adapters' tensors don't change.
    """

    def __init__(self, modules: Modules, adapters: Adapters) -> None:
        self._modules, self._adapters = modules, adapters

    @torch.no_grad()
    def at(self, path: str, name: str) -> tuple[torch.Tensor, int | None]:
        """Returns a weight without the merged adapters, and the fingerprint of what the module has now."""
        noted = vars(self._modules[path]).get(_BITS, {}).get(name)
        if self._modules[path]._parameters.get(name) is None:
            raise AdaptError(
                f"{join(path, name)} is no parameter any more, as after pruning, so the adapters that are merged into "
                "it can't be taken out; take that off first"
            )
        with loaded(self._modules[path], name):
            now = whole(own_parameter(self._modules[path], name).detach())
            bits = None if noted is None else fingerprint(now)
            if bits == noted:
                return self._adapters.originals[path, name], noted
            left = now.clone()
        for change in self._changes.get((path, name), ()):
            amount = self._amount(change, join(path, name))
            if amount is not None:
                left -= amount.to(left.dtype)
        return left, bits

    @functools.cached_property
    def _changes(self) -> dict[tuple[str, str], list[_Change]]:
        """The changes that merged adapters make, by the places of the weights and biases, in the order of merging."""
        found: dict[tuple[str, str], list[_Change]] = {}
        for name in self._adapters.merged:
            for adapted in changing_sites(self._modules, self._adapters.by_name[name]):
                place = adapted.site.owner, adapted.site.attribute
                found.setdefault(place, []).append(_Change(name, adapted, delta))
                if changes_bias(adapted.rule) and adapted.site.bias is not None:
                    found.setdefault(bias_place(adapted), []).append(_Change(name, adapted, bias_delta))
        return found

    @functools.cached_property
    def _are_as_merged(self) -> bool:
        return are_as_merged(self._modules, self._adapters)

    def _amount(self, change: _Change, label: str) -> torch.Tensor | None:
        """Returns what an adapter has added to a weight; None if it has added nothing."""
        with in_own_precision(self._modules):
            amount = change.of(change.adapted, self._modules)
        if amount is None:
            return None
        if asks_of_weights(change.adapted.rule):
            raise AdaptError(
                f"{label} has changed since {change.adapter!r} was merged into it, and the change that "
                f"{change.adapter!r} makes depends on the weight itself, so it can't be taken out; merge_and_unload() "
                "leaves the weights as they are now, with the adapters in them"
            )
        if not self._are_as_merged:
            raise AdaptError(
                f"{label} has changed since {change.adapter!r} was merged into it, and so have tensors of merged "
                "adapters, so nobody knows what was merged; give one of the two its former values"
            )
        return amount


class _Change(NamedTuple):
    """A change that a merged adapter makes of a weight or of a bias, and the function that computes it."""

    adapter: str
    adapted: Any
    of: Callable[[Any, Modules], torch.Tensor | None]


def merged_places(adapters: Adapters) -> list[tuple[str, str]]:
    """Returns the path of the module, and the name, of each tensor that adapters are merged into."""
    return [*adapters.originals, *((path, "weight") for path in adapters.codes)]


def guard(modules: Modules, adapters: Adapters) -> None:
    """Notes the bits of weights into which adapters have just been merged; their modules refuse to load others."""
    for path, name in merged_places(adapters):
        in_place.put_on(modules[path], _LAYER)
        _note(modules[path], {name: None if path in adapters.codes else _bits(modules[path], name)})
    for name in adapters.merged:
        if name not in adapters.merged_bits:
            set_item(adapters.merged_bits, name, _bits_of_adapter(modules, adapters, name))


def release(modules: Modules, adapters: Adapters) -> None:
    """Lets modules load any weights again."""
    for path in dict.fromkeys(path for path, _ in merged_places(adapters)):
        if path in modules:
            in_place.take_off(modules[path], "merged")
            delete_item(vars(modules[path]), _BITS)
    set_attribute(adapters, "merged_bits", {})


def keep_changes(modules: Modules, adapters: Adapters) -> None:
    """Lets the weights that are kept have what has changed since adapters were merged into them."""
    present = WithoutMerged(modules, adapters)
    for path, name in list(adapters.originals):
        if path in modules:
            original, bits = present.at(path, name)
            set_item(adapters.originals, (path, name), original)
            _note(modules[path], {name: bits})


def are_as_merged(modules: Modules, adapters: Adapters) -> bool:
    """Returns whether the tensors of merged adapters have the values that were merged."""
    for name in adapters.merged:
        now, before = _bits_of_adapter(modules, adapters, name), adapters.merged_bits[name]
        # a cast changes the bits, and nothing else that could be told
        if any(before[place] != bits and before[place][0] == bits[0] for place, bits in now.items()):
            return False
    return True


def _bits_of_adapter(
    modules: Modules, adapters: Adapters, name: str
) -> dict[tuple[str, str], tuple[torch.dtype, int | None]]:
    """Returns the dtype and the fingerprint of each of an adapter's tensors, by their places."""
    places = [place for place in adapters.by_name[name].tensor_names(name) if place[0] in modules]
    values = {(path, own): value_of(modules[path], own) for path, own in places}
    return {place: (value.dtype, fingerprint(value)) for place, value in values.items()}


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


def _load(module: Any, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    refuse_others(module, vars(module)[_BITS], prefix, state_dict)
    with in_place.without(module, "merged"):
        module._load_from_state_dict(state_dict, prefix, *args)


def _apply(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Casts and moves a module's tensors, and notes the bits of what had not changed before."""
    noted = {name: bits for name, bits in vars(module)[_BITS].items() if bits is not None}
    unchanged = [name for name, bits in noted.items() if _bits(module, name) == bits]
    with in_place.without(module, "merged"):
        module._apply(*args, **kwargs)
    _note(module, {name: _bits(module, name) for name in unchanged})
    return module


def _layer() -> in_place.Layer:
    return _LAYER


_LAYER = in_place.Layer("merged", (), {"_load_from_state_dict": _load, "_apply": _apply}, (_layer, ()))


def refuse_merged_by_others(modules: Modules, adapters: Adapters, name: str) -> None:
    """Raises AdaptError if adapters of a model around or inside are merged into a module that an adapter changes."""
    adapter, own = adapters.by_name[name], {path for path, _ in merged_places(adapters)}
    for adapted in (*changing_sites(modules, adapter), *adapter.coded_sites):
        path = adapted.site.owner
        if path not in own and path in modules and _BITS in vars(modules[path]):
            raise AdaptError(
                f"an adapter of another model, around this one or inside of it, is merged into {path or 'the model'}, "
                f"and taking it out would take {name!r} out, too; call merge_and_unload(), or unmerge_adapter(), "
                "of that model first"
            )


def refuse_tied(modules: Modules, adapters: Adapters) -> None:
    """Raises AdaptError if two weights into which adapters are merged have become one since."""
    found: dict[int, tuple[str, str]] = {}
    for path, name in adapters.originals:
        parameter = modules[path]._parameters.get(name) if path in modules else None
        if parameter is not None and id(parameter) in found:
            raise AdaptError(
                f"{join(path, name)} and {join(*found[id(parameter)])} were tied since adapters were merged into them, "
                "so these can't be taken out; give one of them a parameter of its own first"
            )
        found[id(parameter)] = path, name
