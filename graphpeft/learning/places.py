"""The tensors that active adapters train, by the places where they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from graphpeft.adapters.state import Adapter, Adapters
from graphpeft.graph import overrides
from graphpeft.graph.holders import has_tensor, tensor_at

ROWS = "rows of weight"
"""The name of the tensor of rows that are trained, such as those of new tokens."""


class Place(NamedTuple):
    """Tensors that one adapter trains at one place.

    Attributes:
        adapter: The adapter's name.
        label: The place's name.
        region: The path of the module whose forward uses them.
        tensors: The tensors by name.
    """

    adapter: str
    label: str
    region: str
    tensors: Mapping[str, Tensor]


def trained_places(state: Adapters, modules: Mapping[str, nn.Module]) -> list[Place]:
    """Returns the places with tensors that active adapters train; merged and disabled ones train none."""
    names = [] if state.are_off else [name for name in state.active if name not in state.merged]
    return list(itertools.chain.from_iterable(_of_adapter(name, state.by_name[name], modules) for name in names))


def _of_adapter(name: str, adapter: Adapter, modules: Mapping[str, nn.Module]) -> Iterator[Place]:
    seen: set[int] = set()
    for adapted in adapter.sites:
        site = adapted.site
        named = {local: attribute for local, attribute in adapted.names.items() if local in adapted.specs}
        # tensors that several places share, as tied ones do, are told at the first
        found = _trained(modules, site.owner, named)
        if tensors := _new(found, seen):
            yield Place(name, site.label, site.region, tensors)
    trained = [(path, own) for path, names in adapter.fully_trained.items() for own in names]
    whole = [(path, own, overrides.override_name(own, name)) for path, own in trained]
    rows = [(path, ROWS, overrides.rows(name)) for path in adapter.rows]
    for path, told, attribute in (*whole, *rows):
        if tensors := _new(_trained(modules, path, {told: attribute}), seen):
            yield Place(name, path or "the model", path, tensors)


def _new(found: Mapping[str, Tensor], seen: set[int]) -> dict[str, Tensor]:
    """Returns the tensors that aren't among those seen, and adds them to these."""
    tensors = {local: tensor for local, tensor in found.items() if id(tensor) not in seen}
    seen |= {id(tensor) for tensor in tensors.values()}
    return tensors


def _trained(modules: Mapping[str, nn.Module], path: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns those of a module's tensors that are trained and not empty, by the names under which they are told."""
    if path not in modules:
        return {}
    held = {told: tensor_at(modules[path], name) for told, name in names.items() if has_tensor(modules[path], name)}
    return {told: tensor for told, tensor in held.items() if tensor.requires_grad and tensor.numel()}
