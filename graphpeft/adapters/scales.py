"""The scales of adapters' changes, multiplied for a while or until set anew: y + m · s · B A x for y + s · B A x."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from graphpeft.adapters.adapting import known_adapter, known_adapters, modules_of
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter
from graphpeft.adapters.swappable import set_number
from graphpeft.graph.holders import place_of
from graphpeft.wording import joined


@contextlib.contextmanager
def scaled(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiplies the scales of all adapters of a model within a context; compiled code is compiled again."""
    state = known_adapters(model)
    refuse_merged(model)
    places = [place for adapter in state.by_name.values() for place in _places(model, adapter)]
    if state.by_name and not places:
        raise AdaptError(f"no adapter of {sorted(state.by_name)} has a scale; LoRA's have")
    before = [getattr(holder, name) for _, holder, name, _ in places]
    try:
        for (_, holder, name, _), scale in zip(places, before, strict=True):
            setattr(holder, name, scale * multiplier)
        yield
    finally:
        for (_, holder, name, _), scale in zip(places, before, strict=True):
            setattr(holder, name, scale)


def set_weights(model: nn.Module, weights: Mapping[str, Callable[[str], float]]) -> None:
    """Gives adapters the scales of their configs times weights; inside a transaction."""
    refuse_merged(model)
    for adapter_name, weight_at in weights.items():
        adapter = known_adapter(model, adapter_name)
        places = _places(model, adapter)
        if not places and any(weight_at(adapted.site.owner) != 1 for adapted in adapter.sites):
            raise AdaptError(f"{adapter_name!r} has no scale that a weight could multiply; LoRA's adapters have one")
        for path, holder, name, own in places:
            set_number(vars(holder), name, own * weight_at(path))


def refuse_merged(model: nn.Module) -> None:
    """Raises an `AdaptError` if an adapter is merged."""
    if merged := known_adapters(model).merged:
        raise AdaptError(f"{joined(merged)} are merged, so their scales are in the weights; unmerge them first")


def _places(model: nn.Module, adapter: Adapter) -> list[tuple[str, nn.Module, str, Any]]:
    """Returns the module's path, the holder and the name of each scale of an adapter, and its value by the config."""
    modules = modules_of(model)
    return [
        (adapted.site.owner, *place_of(modules[adapted.site.owner], adapted.names[scale]), adapted.constants[scale])
        for adapted in adapter.sites
        for scale in adapted.rule.scales
        if scale in adapted.constants
    ]
