"""The base of methods whose change of a weight is a product of two factors that are made from shared tensors.

    ΔW = B A        y' = y + (dropout(x) Aᵀ) Bᵀ        A (r, in), B (out, r)

A linear operation, or a call of a layer, applies factor by factor; elsewhere the product is made. The same numbers as
those of PEFT's ``tuners/vera/layer.py``, ``tuners/randlora/layer.py``, ``tuners/vblora/layer.py`` and others.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from graphpeft.graph.computed_weights import read_weight
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.matrices import matrices_of
from graphpeft.rules.delta_rule import ProductRule
from graphpeft.rules.options import Seed, Turned
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.sites import quantisers
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


class Sizes(NamedTuple):
    """A weight as a matrix, or as a stack of matrices.

    Attributes:
        rows: The number of output features.
        columns: The number of input features; of a convolution, times the size of its kernel.
        stack: The number of matrices, as a shape; () for one.
    """

    rows: int
    columns: int
    stack: tuple[int, ...] = ()


def sizes_of(site: Any) -> Sizes:
    """Returns the sizes of a site's weight in PEFT's layout, or of that for which a call stands."""
    if isinstance(site, LeafSite):
        return Sizes(site.out_features, site.in_features)
    stack, rows, columns = matrices_of(site)
    return Sizes(rows, columns, stack)


@dataclass(frozen=True, kw_only=True)
class Factored(ProductRule):
    """A change that is a product of factors of a weight, or of each matrix in a stack.

    Attributes:
        sizes: The sizes of the weight.
    """

    sizes: Sizes

    needs_matrix: ClassVar[bool] = True
    adapts_calls: ClassVar[bool] = True

    def numbers_unknown(self, site: Any) -> str | None:
        """Returns why the numbers of a site's weight can't be read, for a method that starts from them, or None."""
        if isinstance(site, LeafSite) and not site.is_recoded:
            return f"its weight is decomposed, whose numbers aren't known: it is {site.kind}"
        return None

    def numbers(self, site: Any, module: nn.Module) -> torch.Tensor:
        """Returns the weight without adapters as matrices, (*stack, rows, columns), in single precision at least."""
        is_call = isinstance(site, LeafSite)
        own: Any = quantisers.codes_of(module).numbers() if is_call else read_weight(module, site.attribute)
        weight = self.layout.turned(own.detach().to(torch.promote_types(own.dtype, torch.float32)))
        return weight.reshape(*self.sizes.stack, self.sizes.rows, self.sizes.columns)


@dataclass(kw_only=True)
class FactoredConfig(TargetedConfig):
    """The options that these methods have in common; the names, defaults and meanings are PEFT's.

    Attributes:
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
    """

    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    shared_options: ClassVar[tuple[str, ...]] = ()
    """The tensors that all adapters of the method on one model have to share, as in PEFT."""

    fan_in_fan_out: Turned = False

    def conflict(self, others: Mapping[str, Any]) -> str | None:
        """Refuses other values of `shared_options` than those of the model's other adapters, as PEFT does."""
        for option in self.shared_options:
            for name, other in others.items():
                if other.method == self.method and getattr(other, option) != getattr(self, option):
                    return (
                        f"{option} is {getattr(self, option)!r}, and {getattr(other, option)!r} of the adapter "
                        f"{name!r}: all {self.method} adapters of a model share it, as in PEFT; give both the same"
                    )
        return None


@dataclass(kw_only=True)
class ProjectedConfig(FactoredConfig):
    """The options of methods with random projections that all layers share, each of which cuts them to its size.

    Attributes:
        projection_prng_key: The seed of the projections.
        save_projection: Whether files have the projections. If not, they are drawn again when a file is loaded, by a
            generator that may draw other numbers in another version of PyTorch.
    """

    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    shared_options: ClassVar[tuple[str, ...]] = ("projection_prng_key", "save_projection")

    projection_prng_key: Seed = 0
    save_projection: bool = True

    def prepared(self, sites: Sequence[Any]) -> ProjectedConfig:
        """Returns the config with the sizes of the projections, which are those of the largest weights."""
        config: Any = copy.copy(self)
        sizes = [sizes_of(site) for site in sites]
        rows, columns = max((of.rows for of in sizes), default=0), max((of.columns for of in sizes), default=0)
        config._largest, config._first = (rows, columns), sites[0].label if sites else ""
        return config

    @property
    def largest(self) -> tuple[int, int]:
        """The largest number of rows and of columns among the weights of all sites."""
        return self._largest

    def projection(self, shape: tuple[int, ...], key: str, copied: bool = False) -> ParameterSpec:
        """Returns what a projection is, which all sites share.

        Args:
            shape: Its shape.
            key: Its name in files.
            copied: Whether files have copies of it with each site.
        """
        if not self.save_projection:
            return ParameterSpec(shape, key, scope=key, is_trained=False, is_saved=False)
        return ParameterSpec(shape, key, scope=key, is_trained=False, written_once=True, copied=copied)

    def draws(self, site: Any) -> bool:
        """Returns whether the projections are drawn at a site: at the first, since the others have the same.

        Args:
            site: The site.
        """
        return site.label == self._first
