"""The base of an adapted model with what an adapter trains and changes, added by hand."""

from __future__ import annotations

import torch
from torch import nn

from graphpeft.adapters import changes
from graphpeft.adapters.state import Adapter, Modules
from graphpeft.graph.own_tensors import own_tensor


@torch.no_grad()
def with_trained(base: nn.Module, adapter: Adapter, modules: Modules) -> nn.Module:
    """Gives a base the tensors that an adapter trains whole, or that modules read in place of their own."""
    read_instead = [(path, name) for path, names in adapter.overrides.items() for name in names]
    for path, name in (*read_instead, *((path, "weight") for path in adapter.rows)):
        getattr(base.get_submodule(path), name).copy_(own_tensor(modules[path], name))
    return base


@torch.no_grad()
def with_deltas(base: nn.Module, adapter: Adapter, modules: Modules) -> nn.Module:
    """Adds the change of each weight, and of each bias, that an adapter makes."""
    with_trained(base, adapter, modules)
    for adapted in changes.changing_sites(modules, adapter):
        base.get_parameter(adapted.site.weight).add_(changes.delta(adapted, modules))
        # a bias that the adapter trains is there already
        place = getattr(adapted.site, "bias", None)
        bias = base.get_parameter(place) if place is not None else None
        change = changes.bias_delta(adapted, modules, base_bias=bias)
        if change is not None and bias is not None:
            bias.add_(change)
    return base
