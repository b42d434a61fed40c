"""Tests whether a layer's own forward has a gradient for its input and for its weight.

A hand-written forward, or one that computes with integers, may have no gradient. PyTorch gives no error: the layers in
front just aren't trained. So a copy of the layer runs on one row of numbers.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn

from graphpeft.graph import in_place, ops
from graphpeft.graph.errors import OUT_OF_MEMORY
from graphpeft.graph.hosts.accelerate import unhooked
from graphpeft.graph.traced_model import stands_for
from graphpeft.sites.layer_kinds import declared_features, declares_features
from graphpeft.sites.quantised import way_of_computing
from graphpeft.sites.regions import Regions
from graphpeft.sites.site import LeafSite, Site


class Flow(NamedTuple):
    """The tensors of a layer that get a gradient.

    Attributes:
        to_input: Whether the layer's input gets a gradient.
        to_weight: Whether the layer's weight gets a gradient, if it is trained.
    """

    to_input: bool
    to_weight: bool


ALL = Flow(True, True)


def flow_of(module: nn.Module, features: int, dtype: torch.dtype) -> Flow:
    """Returns the tensors that get a gradient in a layer's call; `ALL` if the layer doesn't take one row of numbers."""
    with unhooked(module):
        return _flow_of(module, features, dtype)


def _flow_of(module: nn.Module, features: int, dtype: torch.dtype) -> Flow:
    weight = module._parameters.get("weight")
    device = torch.get_default_device() if weight is None else weight.device
    if device.type == "meta":
        return ALL
    given = torch.ones(1, features, dtype=dtype, device=device, requires_grad=True)
    try:
        copied = copy.deepcopy(module)
        own = copied._parameters.get("weight")
        if own is not None and own.is_floating_point():
            own.requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            returned = in_place.original_class(copied).forward(copied, given)
            if returned.requires_grad:
                returned.sum().backward()
    except OUT_OF_MEMORY:
        raise
    except Exception:
        return ALL  # a user's code may raise any error for such inputs
    return Flow(given.grad is not None, own is not None and own.grad is not None)


def trains(regions: Regions, site: Site) -> bool:
    """Returns whether the layer's forward has a gradient for the weight that is the site; True if it isn't known."""
    if site.op is not ops.Weight or site.region != site.owner:
        return True
    module = regions.modules[site.owner]
    return not declares_features(module) or flow_of(module, declared_features(module)[0], site.dtype).to_weight


def hands_gradients_on(regions: Regions, site: LeafSite) -> bool:
    """Returns whether the call of a layer has a gradient for its input; one layer of each kind is tested."""
    module = regions.modules[site.owner]
    weight = module._parameters.get("weight")
    kind = (stands_for(module), None if weight is None else way_of_computing(weight))
    if kind not in regions.flows:
        regions.flows[kind] = flow_of(module, site.in_features, site.dtype)
    return regions.flows[kind].to_input
