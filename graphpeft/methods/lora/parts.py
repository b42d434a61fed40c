"""LoRA of parts of a fused projection, such as q and v of a ``qkv`` layer, with factors of their own.

    y_p = x W_pᵀ + b_p + s · dropout(x) A_pᵀ B_pᵀ           for each part p, the rows of W that it has

The other rows stay as they are. In files, and in stock LoRA, this is one adapter of the rank n · r for n parts: the A's
stacked, and a B that is zero where a part's rows meet another part's rank; α is n times as large (√n times with
rank-stabilised scaling), so that the scale is the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.methods.lora.factors import (
    constants_of,
    draw_as_layer,
    rank_of,
    refused_dropout,
    refused_unless_plain,
)
from graphpeft.methods.lora.linear import matrix_delta
from graphpeft.rules.rule import FileForm, Mergeable, OperationRule, ParameterSpec
from graphpeft.sites.site import Runs, Site


@dataclass(frozen=True)
class LoraParts(OperationRule, Mergeable):
    """The branch of some rows of a linear operation.

    A is (n · r, in), the parts' own below one another; B is (rows of all parts, r), likewise.

    Attributes:
        parts: The rows of each part.
        rows: How many the weight has.
        flipped: Whether the weight is stored as (in, out).
        drops: Whether the branch has dropout.
        casts: Whether the dtype of A and B differs from the weight's.
    """

    parts: tuple[Runs, ...]
    rows: int
    flipped: bool
    drops: bool
    casts: bool

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses rows that the weight doesn't have, rows in several parts, and what is for whole layers."""
        reason = refused_unless_plain(config, "a part of one") or refused_dropout(site, config)
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
            "lora_A": ParameterSpec((count * rank, columns), key="lora_A.weight"),
            "lora_B": ParameterSpec((own_rows, rank), key="lora_B.weight", form=form),
        }

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the scale, and the probability of dropout if there is one."""
        return constants_of(site, config, self.drops)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws each part's factors as those of a layer of its own."""
        rank = rank_of(site, config)
        for A, B in zip(parameters["lora_A"].split(rank), _of_parts(self.parts, parameters["lora_B"]), strict=True):
            draw_as_layer(A)
            B.zero_()
            if config.init_lora_weights == "gaussian":
                A.normal_(std=1 / rank)
            elif config.init_lora_weights is False:
                draw_as_layer(B)

    def rewrite(
        self,
        x: Any,
        y: Any,
        lora_A: Any,
        lora_B: Any,
        *,
        lora_scaling: Any,
        lora_dropout: Any = None,
        training: Any,
    ) -> Any:
        """Adds the branch to the operation's value."""
        h = x.to(lora_A.dtype) if self.casts else x
        if self.drops:
            h = F.dropout(h, lora_dropout, training)
        product = F.linear(F.linear(h, lora_A), dense(self.parts, self.rows, lora_B))
        result = add_scaled(y, product, lora_scaling)
        return result.to(y.dtype) if self.casts else result

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s B A of all parts, transposed where the weight is stored so."""
        return matrix_delta(self.flipped, lora_A, dense(self.parts, self.rows, lora_B), lora_scaling)


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
    """B as files have it."""

    parts: tuple[Runs, ...]
    rows: int

    def __call__(self, compact: Tensor) -> Tensor:
        return dense(self.parts, self.rows, compact)


@dataclass(frozen=True)
class _Compact:
    """B as the model has it, from a file's.

    Raises:
        ValueError: If the file's isn't zero beside the parts' own blocks.
    """

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
    """Returns the rank and α with which stock LoRA has the same adapter as so many parts of a rank and an α each."""
    return parts * rank, _times(parts, rslora) * alpha


def of_parts(parts: int, rank: int, alpha: float, rslora: bool) -> tuple[int, float]:
    """Returns what `as_stock` was given for so many parts."""
    # without the last digit, in which a product with √n, divided by it, may be another number
    return rank // parts, float(f"{alpha / _times(parts, rslora):.15g}")


def _times(parts: int, rslora: bool) -> float:
    return math.sqrt(parts) if rslora else parts
