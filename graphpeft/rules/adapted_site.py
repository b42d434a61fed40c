"""A site with the rule that adapts it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from graphpeft.graph import slots
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import changes_bias
from graphpeft.sites.site import CallSite, LeafSite, Site


class AdaptedSite(NamedTuple):
    """A site with the rule that adapts it and what the rule creates there.

    Attributes:
        site: The site.
        rule: The rule.
        specs: The rule's parameters by name.
        constants: The rule's constants by name.
        names: The attributes of the weight's module under which these live, by the rule's names for them.
        dtype: The dtype of the parameters.
        replaced: The names of the adapter's frozen overrides, by the names of what the weight's module has itself.
        shared: The parameters that are those of another site: their module's path and their names there.
    """

    site: Site | LeafSite | CallSite
    rule: Any
    specs: Mapping[str, ParameterSpec]
    constants: Mapping[str, float]
    names: Mapping[str, str]
    dtype: torch.dtype
    replaced: Mapping[str, str] = MappingProxyType({})
    shared: Mapping[str, tuple[str, str]] = MappingProxyType({})

    @property
    def stems(self) -> set[str]:
        """The names of these attributes without that of the adapter."""
        return {f"{self.site.prefix}{name}" for name in self.names}

    def in_slot(self, slot: int) -> Mapping[str, str]:
        """Returns the names of these attributes in graphs, where the adapter has a slot; likewise."""
        return _in_slot(tuple(self.names), self.site.prefix, slot)

    @property
    def unmergeable(self) -> str | None:
        """The reason why what the adapter does at the site is no change of a weight, or None."""
        reason = self.site.unmergeable or self.rule.unmergeable(self.site)
        if reason is None and isinstance(self.site, Site) and changes_bias(self.rule):
            return self.site.bias_conflict
        return reason

    @property
    def parameter_count(self) -> int:
        """The number of elements that the rule's own parameters have."""
        return sum(prod(spec.shape) for name, spec in self.specs.items() if name not in self.shared)


# equal sites share one
@functools.lru_cache(maxsize=1024)
def _in_slot(of_rule: tuple[str, ...], prefix: str, slot: int) -> Mapping[str, str]:
    return {name: slots.in_slot(f"{prefix}{name}", slot) for name in of_rule}
