"""Gives a config the weights of its sites, also where accelerate or a sharding has their values elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from graphpeft.graph.values import loaded
from graphpeft.sites.site import Site

T = TypeVar("T")


class WeightReader:
    """Reads the weights of sites as they are without adapters.

    Args:
        modules: The model's modules by path.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules

    def read(self, site: Any, function: Callable[[nn.Module], T]) -> T:
        """Returns what a function makes of the module that owns a site's weight, while that has its values.

        Args:
            site: The site.
            function: The function. Its result may hold no part of the weight, but copies.
        """
        beside, _ = site.beside
        with loaded(self._modules[beside]):
            return function(self._modules[site.owner if isinstance(site, Site) else beside])
