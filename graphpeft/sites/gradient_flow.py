"""Whether a layer's own forward has a gradient for what it is given, and for its weight.

A forward that is written by hand, or computes with integers, need not have one, and PyTorch says nothing: what lies in
front of it just isn't trained. So a copy of the layer is run on one row of numbers.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn

from graphpeft.graph import in_place, ops
from graphpeft.graph.errors import OUT_OF_MEMORY
from graphpeft.graph.traced_model import stands_for
from graphpeft.sites.layer_kinds import declared_features, declares_features
from graphpeft.sites.quantised import way_of_computing
from graphpeft.sites.regions import Regions
from graphpeft.sites.site import LeafSite, Site


class Flow(NamedTuple):
    """Where a gradient goes.

    Attributes:
        to_input: Whether it goes to what the layer is given.
        to_weight: Whether it goes to the layer's weight, if that is trained.
    """

    to_input: bool
    to_weight: bool


ALL = Flow(True, True)


def flow_of(module: nn.Module, features: int, dtype: torch.dtype) -> Flow:
    """Returns where a gradient goes in the call of a layer; everywhere, if the layer doesn't take one row of numbers.

    Args:
        module: The layer, which stays as it is.
        features: The number of its inputs.
        dtype: Their dtype.
    """
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
        return ALL  # what a user's code raises for such inputs can be anything
    return Flow(given.grad is not None, own is not None and own.grad is not None)


def trains(regions: Regions, site: Site) -> bool:
    """Returns whether the forward of the layer whose weight is the site has a gradient for it, as far as is known."""
    if site.op is not ops.Weight or site.region != site.owner:
        return True
    module = regions.modules[site.owner]
    return not declares_features(module) or flow_of(module, declared_features(module)[0], site.dtype).to_weight


def hands_gradients_on(regions: Regions, site: LeafSite) -> bool:
    """Returns whether the call of a layer has a gradient for what it is given; one layer of each kind is asked."""
    module = regions.modules[site.owner]
    weight = module._parameters.get("weight")
    kind = (stands_for(module), None if weight is None else way_of_computing(weight))
    if kind not in regions.flows:
        regions.flows[kind] = flow_of(module, site.in_features, site.dtype)
    return regions.flows[kind].to_input
