"""The best approximation of low rank of changes of weights, as the factors of plain LoRA.

    ΔW = U S Vᵀ        B = U₍ₖ₎ S₍ₖ₎    A = V₍ₖ₎ᵀ    s = 1        with the first k columns and singular values

k is given, or the smallest one for which S₁² + … + Sₖ² is a given share of the sum of all squares.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphpeft.adapters.adapting import planned, refuse
from graphpeft.adapters.file_names import keys
from graphpeft.adapters.plan import Plan
from graphpeft.adapters.state import Adapter, Modules
from graphpeft.methods.lora.combination import as_factors, padded
from graphpeft.methods.lora.config import LoraConfig
from graphpeft.methods.lora.rule import Combines
from graphpeft.progress import over
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.targeting import pattern_values


def checked(rank: float) -> float:
    """Returns a rank, an int, or a share of the squares, a float."""
    if isinstance(rank, bool) or not isinstance(rank, float | numbers.Integral):
        raise TypeError(f"rank is a {type(rank).__name__}; give an int, or a share of the squares as a float")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"rank={rank} is a float, and so a share of the squares: it must be between 0 and 1")
    if not isinstance(rank, float) and rank <= 0:
        raise ValueError(f"rank={rank} leaves nothing of an adapter; choose a positive one")
    return rank if isinstance(rank, float) else int(rank)


def approximated(
    model: nn.Module,
    config: LoraConfig,
    change_of: Callable[[AdaptedSite], Tensor],
    rank: float,
    name: str,
    progressbar: bool,
) -> tuple[Plan, dict[tuple[str, str], Tensor]]:
    """Gives a config the ranks of the best approximations, and returns what it does to a model, and the factors."""
    by_weight = by_weight_of(plan_of(model, config, name).sites)
    weights: Iterable[Any] = by_weight.items()
    shown = over(weights, "converting to LoRA", "weights") if progressbar else weights
    products = {weight: _approximated(target, change_of(target), rank) for weight, target in shown}
    ranks: dict[str, int] = {}
    for weight, target in by_weight.items():
        ranks[target.site.name] = max(ranks.get(target.site.name, 0), products[weight].rank)
    config.r = config.lora_alpha = int(rank) if isinstance(rank, int) else max(ranks.values())
    own = {pattern_values.pattern_of(name): found for name, found in ranks.items() if found != config.r}
    config.rank_pattern, config.alpha_pattern = own, dict(own)
    plan = plan_of(model, config, name)
    _refuse_unfit(plan)
    return plan, _factors(plan, products)


class _Product(NamedTuple):
    """The best approximation of a change: factors of shapes (rows, rank) and (rank, columns), or stacks of such."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


def plan_of(model: nn.Module, config: LoraConfig, name: str) -> Plan:
    """Returns what a config of plain LoRA does to a model, which stays as it is."""
    plan = planned(model, config, name)
    refuse(plan)
    for adapted in plan.sites:
        if not isinstance(adapted.rule, Combines):
            raise TypeError(f"{adapted.site.label}: its change is no product of two matrices; leave it as it is")
    return plan


def by_weight_of(sites: Iterable[Any]) -> dict[str, Any]:
    """Returns adapted sites by the path of their weight."""
    return {adapted.site.weight: adapted for adapted in sites}


def _refuse_unfit(plan: Plan) -> None:
    """Raises ValueError if LoRA of a rank makes another kind of change at a site, as across the groups of features."""
    for adapted in plan.sites:
        if adapted.unmergeable is not None:
            raise ValueError(
                f"{adapted.site.label} can't have LoRA of this rank: {adapted.unmergeable}; choose another"
            )


@torch.no_grad()
def _approximated(target: AdaptedSite, change: Tensor, rank: float) -> _Product:
    product = target.rule.as_product(change).to(target.dtype) / target.constants["lora_scaling"]
    U, S, V = torch.linalg.svd(product, full_matrices=False)
    own, most = rank if isinstance(rank, int) else _reaching(S, rank), S.shape[-1]
    if own > most:
        raise ValueError(
            f"rank={rank} is larger than {target.site.label} has rows or columns; choose one of at most {most}"
        )
    return _Product(U[..., :own] * S[..., None, :own], V[..., :own, :])


def _reaching(S: Tensor, share: float) -> int:
    """Returns how many singular values, one at least, reach a share of the sum of all squares everywhere in a stack."""
    sums = S.square().cumsum(-1)
    return min(int(torch.searchsorted(sums, share * sums[..., -1:]).max()) + 1, S.shape[-1])


def _factors(plan: Plan, products: Mapping[str, _Product]) -> dict[tuple[str, str], Tensor]:
    """Returns the factors of all weights by the path of their module and their name there."""
    made: dict[tuple[str, str], Tensor] = {}
    for weight, adapted in by_weight_of(plan.sites).items():
        A, B = as_factors(adapted, *products[weight])
        for local, factor in (("lora_A", A), ("lora_B", B)):
            made[adapted.site.owner, adapted.names[local]] = padded(adapted, local, factor)
    return made


def by_key(plan: Plan, found: Mapping[tuple[str, str], Tensor], name: str, modules: Modules) -> dict[str, Tensor]:
    """Returns the tensors of an adapter by their names in its file."""
    return {key: found[place] for key, place in keys(Adapter.of(plan), name, modules).items()}
