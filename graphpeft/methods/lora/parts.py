"""LoRA of parts of a fused projection, such as q and v of a ``qkv`` layer, with factors of their own.

    y'_p = y_p + s · dropout(x) A_pᵀ B_pᵀ           for each part p, some rows of the weight;  y_p = x W_pᵀ + b_p

The other rows stay as they are. A config names parts by their names, which the graph tells, or by their rows. In files,
and in stock LoRA, all n parts are one adapter of the rank n · r: the A's stacked, and a B that is zero where a part's
rows meet another part's rank; α is n times as large (√n times with rank-stabilised scaling), so that the scale is the
same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.errors import TraceError
from graphpeft.methods.lora.factors import draw_as_layer, rank_of
from graphpeft.methods.lora.rule import LoraBranch, dropout_refusal, variant_refusal
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec, RankAxis
from graphpeft.rules.products import Product
from graphpeft.rules.report import Refusal, Report
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.parts import parts_of
from graphpeft.sites.site import LeafSite, Runs, Site
from graphpeft.targeting import targets


@dataclass(frozen=True, kw_only=True)
class LoraParts(LoraBranch):
    """The branch of some rows of a linear operation.

    A is (n · r, in), the parts' own below one another; B is (rows of all parts, r), likewise.

    Attributes:
        parts: The rows of each part.
        rows: The number of rows of the weight.
    """

    parts: tuple[Runs, ...]
    rows: int

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses rows that the weight doesn't have, rows in several parts, and variants for whole layers."""
        reason = variant_refusal(config, "a part of one") or dropout_refusal(site, config)
        if reason is not None:
            return reason
        if len(site.shape) != 2:
            return f"its weight has the shape {site.shape}, and parts are rows of a matrix"
        if site.named is not None:
            return "its name stands for several weights; name the one with parts in target_parameters"
        runs = sorted(run for part in self.parts for run in part)
        for first, behind in runs:
            if not 0 <= first < behind <= self.rows:
                return f"rows {first} to {behind} of a part aren't among its {self.rows}"
        for (_, behind), (first, _) in itertools.pairwise(runs):
            if first < behind:
                return f"its parts overlap: row {first} is in two of them"
        return None

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        rank, count = rank_of(site, config), len(self.parts)
        columns = site.shape[0] if self.flipped else site.shape[1]
        form = FileForm((self.rows, count * rank), _Dense(self.parts, self.rows), _Compact(self.parts, rank))
        own_rows = sum(behind - first for part in self.parts for first, behind in part)
        return {
            "lora_A": ParameterSpec((count * rank, columns), key="lora_A.weight", rank=RankAxis(0, count)),
            "lora_B": ParameterSpec((own_rows, rank), key="lora_B.weight", form=form, rank=RankAxis(1)),
        }

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws each part's factors like those of a layer of its own."""
        rank = rank_of(site, config)
        for A, B in zip(parameters["lora_A"].split(rank), _of_parts(self.parts, parameters["lora_B"]), strict=True):
            draw_as_layer(A)
            B.zero_()
            if config.init_lora_weights == "gaussian":
                A.normal_(std=1 / rank)
            elif config.init_lora_weights is False:
                draw_as_layer(B)

    def factored(self, lora_A: Any, lora_B: Any) -> Product:
        """Returns B A of all parts, zero beside their rows."""
        return Product((dense(self.parts, self.rows, lora_B), lora_A))


def dense(parts: tuple[Runs, ...], rows: Any, compact: Any) -> Any:
    """Returns B of shape (rows, n · r), zero beside the parts' own blocks.

    Args:
        parts: The rows of each part.
        rows: The number of all rows.
        compact: B of shape (rows of all parts, r), the parts below one another.
    """
    rank, count = compact.shape[1], len(parts)
    blocks: dict[int, tuple[int, Any]] = {}
    taken = 0
    for index, part in enumerate(parts):
        for first, behind in part:
            own = compact[taken : taken + behind - first]
            blocks[first] = (behind, F.pad(own, (index * rank, (count - 1 - index) * rank)))
            taken += behind - first
    pieces, reached = [], 0
    for first, (behind, block) in sorted(blocks.items()):
        if first > reached:
            pieces.append(compact.new_zeros(first - reached, count * rank))
        pieces.append(block)
        reached = behind
    return torch.cat([*pieces, compact.new_zeros(rows - reached, count * rank)])


def _of_parts(parts: tuple[Runs, ...], compact: Tensor) -> tuple[Tensor, ...]:
    return compact.split([sum(behind - first for first, behind in part) for part in parts])


@dataclass(frozen=True)
class _Dense:
    """Makes B as files have it, (rows, n · r)."""

    parts: tuple[Runs, ...]
    rows: int

    def __call__(self, compact: Tensor) -> Tensor:
        return dense(self.parts, self.rows, compact)


@dataclass(frozen=True)
class _Compact:
    """Makes B as the model has it, (rows of all parts, r), of a file's."""

    parts: tuple[Runs, ...]
    rank: int

    def __call__(self, stored: Tensor) -> Tensor:
        blocks = [
            stored[first:behind, index * self.rank : (index + 1) * self.rank]
            for index, part in enumerate(self.parts)
            for first, behind in part
        ]
        compact = torch.cat(blocks)
        if not torch.equal(dense(self.parts, stored.shape[0], compact), stored):
            raise ValueError("lora_B isn't zero beside the parts' own rows and ranks; load it without target_parts")
        return compact


def as_stock(parts: int, rank: int, alpha: float, rslora: bool) -> tuple[int, float]:
    """Returns the rank and the α of stock LoRA for so many parts of a rank and an α each."""
    return parts * rank, _times(parts, rslora) * alpha


def of_parts(parts: int, rank: int, alpha: float, rslora: bool) -> tuple[int, float]:
    """Returns the rank and the α of each of so many parts: the inverse of `as_stock`."""
    # without the last digit, in which a product with √n, divided by it, may be another number
    return rank // parts, float(f"{alpha / _times(parts, rslora):.15g}")


def _times(parts: int, rslora: bool) -> float:
    return math.sqrt(parts) if rslora else parts


# parts that a config names


def with_parts(
    sites: Sequence[Site | LeafSite], wanted: Mapping[str, list[Any]], finder: SiteFinder, report: Report
) -> list[Site | LeafSite]:
    """Returns the sites with the parts of fused projections that a config names."""
    found: list[Site | LeafSite] = []
    used: set[str] = set()
    for site in sites:
        key = _key_for(site.name, wanted)
        if key is None:
            found.append(site)
            continue
        used.add(key)
        if isinstance(site, LeafSite):
            report.refused.append(Refusal(site.name, "it has no weight whose rows could be told apart"))
            continue
        try:
            found.append(site._replace(parts=_parts(site, wanted[key], finder)))
        except TraceError as error:
            way_out = f"name its rows, as in target_parts={{{key!r}: [[0, 64], [128, 192]]}}"
            report.refused.append(
                Refusal(site.name, f"which of its rows are which part can't be told: {error}", way_out)
            )
    for key in wanted.keys() - used:
        near = targets.near_misses([key], [site.name for site in sites])
        hint = f"; near misses: {', '.join(near)}" if near else ""
        report.refused.append(Refusal(key, f"target_parts names no target{hint}", "name a target, or leave it out"))
    return found


def wanted_parts(name: str, wanted: Mapping[str, list[Any]]) -> list[Any] | None:
    """Returns the parts that a config names of the projection of this name, or None if it names none."""
    key = _key_for(name, wanted)
    return None if key is None else wanted[key]


def _key_for(name: str, wanted: Mapping[str, list[Any]]) -> str | None:
    return next((key for key in wanted if name == key or name.endswith(f".{key}")), None)


def _parts(site: Site, wanted: list[Any], finder: SiteFinder) -> tuple[Runs, ...]:
    named = [part for part in wanted if isinstance(part, str)]
    if site.op is ops.Weight and named:
        raise TraceError("its weight is used as such, and not in a linear operation whose result is parted")
    if site.op not in (ops.Linear, ops.Weight):
        raise TraceError(f"its weight is used in a {site.op.__name__.lower()}, not a linear operation")
    known = parts_of(finder.regions, site) if named else {}
    unknown = [name for name in named if name not in known]
    if unknown:
        raise TraceError(f"there is no part {unknown[0]!r}, but {', '.join(known)}")
    return tuple(known[part] if isinstance(part, str) else ((int(part[0]), int(part[1])),) for part in wanted)
