"""AdaMSS at a weight.

ΔW and Δb are the columns of P [B₁ A₁; …; Bₙ Aₙ] C        P brings the groups' rows to their places
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.methods.adamss.groups import Group, fresh_factor, own_bias, rank_of, same_directions
from graphpeft.methods.factored import Factored
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.products import Factor, Product


@dataclass(frozen=True, kw_only=True)
class Adamss(Factored):
    """The change of a weight, and of the bias beside it.

    Attributes:
        count: The number of groups.
        has_bias: Whether there is a bias.
    """

    count: int
    has_bias: bool

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses stacks of matrices, and weights whose rows aren't in groups."""
        reason = super().check(site, config)
        if reason is None and self.sizes.stack:
            reason = "it is a stack of matrices, each of which has groups of other sizes"
        groups = config.groups_at(site) if reason is None else ()
        return groups if isinstance(groups, str) else reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the factors of each group, C, and where each row is among those of the groups."""
        rank, columns = rank_of(site, config), self.sizes.columns + self.has_bias
        specs = {}
        for number, (rows, own) in enumerate(config.groups_at(site)):
            specs[f"adamss_A_{number}"] = ParameterSpec((own, rank), f"adamss_A.{number}")
            specs[f"adamss_B_{number}"] = ParameterSpec((len(rows), own), f"adamss_B.{number}")
        places = ParameterSpec((self.sizes.rows,), "adamss_places", is_trained=False, is_saved=False, dtype=torch.int64)
        return {
            "adamss_newB": ParameterSpec((rank, columns), "adamss_newB", is_trained=False),
            "adamss_places": places,
            **specs,
        }

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Decomposes the weight, and makes A of its left singular vectors; B is zero, or drawn."""
        left, right = config.directions_of(site, module)
        parameters["adamss_newB"].copy_(right)
        groups = config.groups_at(site)
        parameters["adamss_places"].copy_(_places(groups))
        for number, group in enumerate(groups):
            factor = fresh_factor(left[group.rows.to(left.device)], group, config)
            parameters[f"adamss_A_{number}"].copy_(factor)
            B = parameters[f"adamss_B_{number}"].zero_()
            if config.init_weights is None:
                # PEFT draws in the weight's precision, where the weight is
                B.copy_(torch.randn(B.shape, dtype=site.dtype, device=left.device) * 0.01)

    def complete(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Fills the places of rows; refuses files of other weights, whose rows may be in other groups."""
        parameters["adamss_places"].copy_(_places(config.groups_at(site)))
        _, right = config.directions_of(site, module)
        if not same_directions(parameters["adamss_newB"], right):
            raise ValueError(
                "its rows are grouped by the base's weight, and the file's adamss_newB isn't what this weight gives; "
                "load it on the very base that it was trained on, on the same kind of device"
            )

    @property
    def changes_bias(self) -> bool:
        """Whether there is a bias."""
        return self.has_bias

    def product(self, adamss_newB: Any, adamss_places: Any, **factors: Any) -> Product:
        """Returns P [B₁ A₁; …] C; the last column of C is the bias of C's result, if there is a bias."""
        columns = self.sizes.columns
        inner = _Affine(adamss_newB[:, :columns], adamss_newB[:, columns] if self.has_bias else None)
        return Product((_Grouped(adamss_places, self._pairs(factors)), inner), adds_bias=True)

    def _pairs(self, factors: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        return [(factors[f"adamss_B_{n}"], factors[f"adamss_A_{n}"]) for n in range(self.count)]

    def bias_delta(self, adamss_newB: Any, adamss_places: Any, **factors: Any) -> Any:
        """Returns Δb, or None."""
        return _Grouped(adamss_places, self._pairs(factors)).matrix() @ adamss_newB[:, -1] if self.has_bias else None


@dataclass(frozen=True)
class _Affine(Factor):
    """A matrix with a bias."""

    columns: Any
    bias: Any

    def applied(self, h: Any) -> Any:
        """Returns h Cᵀ + c."""
        return F.linear(h, self.columns, self.bias)

    def matrix(self) -> Any:
        """Returns C."""
        return self.columns


@dataclass(frozen=True)
class _Grouped(Factor):
    """P [B₁ A₁; …; Bₙ Aₙ], by the places of rows and each group's B and A."""

    places: Any
    pairs: list[tuple[Any, Any]]

    def applied(self, h: Any) -> Any:
        """Returns the groups' results in the order of the rows."""
        rows = torch.cat([F.linear(F.linear(h, A), B) for B, A in self.pairs], -1)
        # of a matrix, since columns of a tensor with more dimensions take several times as long
        return rows.reshape(-1, rows.shape[-1]).index_select(1, self.places).reshape(rows.shape)

    def matrix(self) -> Any:
        """Returns the groups' products in the order of the rows."""
        return torch.cat([B @ A for B, A in self.pairs])[self.places]


def _places(groups: Sequence[Group]) -> Tensor:
    """Returns where each row is among those of the groups, one group after the other."""
    return torch.argsort(torch.cat([group.rows for group in groups]))


def has_bias(site: Any) -> bool:
    """Returns whether a bias belongs to a site's weight."""
    return own_bias(site) is not None
