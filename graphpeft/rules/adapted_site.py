"""A site with the rule that adapts it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from graphpeft.graph import slots
from graphpeft.rules.parameter_spec import Dropout, ParameterSpec
from graphpeft.rules.rule import changes_bias
from graphpeft.sites.site import CallSite, LeafSite, Site

NamesInHolder = tuple[tuple[str, str], ...]
"""The rule's names of its parameters and constants, each with its path in an adapter's holder."""


class AdaptedSite(NamedTuple):
    """A site with the rule that adapts it, and the rule's parameters and constants there.

    Attributes:
        site: The site.
        rule: The rule.
        specs: The rule's parameters by name.
        constants: The rule's constants by name.
        names: The attributes of the owner that hold parameters and constants, by the rule's names for them.
        in_holder: The paths of the same in the adapter's holder.
        dtype: The dtype of the parameters.
        is_change: Whether what the adapter does there is a change of the weight, as far as the rule tells.
        changed: The names of the owner's tensors that the adapter changes there: a weight, and the bias beside it.
        replaced: The names of the adapter's frozen overrides, by the names of the owner's own tensors.
        shared: The parameters that another site holds: the path of its owner, and their name there.
    """

    site: Site | LeafSite | CallSite
    rule: Any
    specs: Mapping[str, ParameterSpec]
    constants: Mapping[str, float]
    names: Mapping[str, str]
    in_holder: NamesInHolder
    dtype: torch.dtype
    is_change: bool
    changed: tuple[str, ...] = ()
    replaced: Mapping[str, str] = MappingProxyType({})
    shared: Mapping[str, tuple[str, str]] = MappingProxyType({})

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedSite:
        """Returns an equal one; only the rule may hold an object of its model, such as a log."""
        return self._replace(rule=copy.deepcopy(self.rule, memo))

    def in_slot(self, slot: int) -> Mapping[str, str]:
        """Returns the attributes' slot names, under which graphs read them, by the rule's names."""
        return _in_slot(self.in_holder, self.rule.held_in, slot)

    @property
    def unmergeable(self) -> str | None:
        """The reason why the adapter's change at the site can't be merged, or None."""
        reason = self.site.unmergeable or self.rule.unmergeable(self.site)
        if reason is None and isinstance(self.site, Site) and changes_bias(self.rule):
            return self.site.bias_conflict
        return reason

    @property
    def parameter_count(self) -> int:
        """The number of elements of the rule's parameters, without shared ones."""
        return sum(prod(spec.shape) for name, spec in self.specs.items() if name not in self.shared)


def names_in_holder(specs: Mapping[str, ParameterSpec], constants: Mapping[str, float], prefix: str) -> NamesInHolder:
    """Returns the names of what a rule has at a site, and where an adapter's holder has it."""
    paths = [(name, spec.path or prefix + name) for name, spec in specs.items()]
    for name, value in constants.items():
        if type(value) is Dropout:
            paths += [(name, f"{prefix}{name}.p"), ("training", f"{prefix}{name}.training")]
        else:
            paths.append((name, prefix + name))
    return tuple(paths)


# cached, so that equal sites share one dict
@functools.lru_cache(maxsize=1024)
def _in_slot(names: NamesInHolder, group: str, slot: int) -> Mapping[str, str]:
    return {name: slots.in_slot(path, slot, group) for name, path in names}
