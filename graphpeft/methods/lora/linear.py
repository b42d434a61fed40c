"""LoRA at a linear operation.

    y = x Wᵀ + b + s · (dropout(x) Aᵀ Bᵀ + c)

where c, the bias of B, is there with `lora_bias` alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import as_node
from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.methods.lora import initialisation
from graphpeft.methods.lora.factors import (
    bias_change,
    bias_parameter,
    constants_of,
    input_of,
    rank_of,
    refused_bias,
    refused_inside,
    unmergeable_bias,
)
from graphpeft.rules.rule import Combines, Mergeable, OperationRule, ParameterSpec, ReplacesWeight, RunsByRow
from graphpeft.sites.site import Site


@dataclass(frozen=True)
class LoraLinear(OperationRule, Mergeable, ReplacesWeight, RunsByRow, Combines):
    """The branch of a linear operation.

    The weight is (m, n), A is (r, n) and B is (m, r), so that ΔW = s B A. A layer that stores its weight as (in, out)
    has the shapes of its transpose, and so A is (r, in) and B (out, r) in every layer, as in PEFT. For a plain
    parameter they don't depend on how it is used, as in PEFT's `target_parameters`.

    Attributes:
        flipped: Whether A and B are those of the weight's transpose.
        drops: Whether the branch has dropout.
        casts: Whether the dtype of A and B differs from the weight's.
        has_bias: Whether B has a bias.
    """

    flipped: bool
    drops: bool
    casts: bool
    has_bias: bool = False

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses a bias of B where PEFT has none, and what an initialisation refuses."""
        return (
            refused_inside(site, config)
            or refused_bias(site, config)
            or initialisation.refused(site, config, self.flipped)
        )

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, and the bias of B if there is one."""
        rows, columns = reversed(site.shape) if self.flipped else site.shape
        factors = matrix_factors(rank_of(site, config), rows, columns, initialisation.b_is_trained(config))
        return {**factors, **bias_parameter(rows)} if self.has_bias else factors

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the scale, and the probability of dropout if there is one."""
        return constants_of(site, config, self.drops)

    def replaces(self, site: Site, config: Any) -> bool:
        """Tells whether A and B start with a part of the weight, which is then taken from it."""
        return initialisation.replaces_weight(config)

    def initialise(
        self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, Tensor] | None:
        """Gives A and B the values that PEFT gives them."""
        return initialisation.initialise(parameters, site, config, module, self.flipped)

    def rewrite(
        self,
        x: Any,
        y: Any,
        operation: Any,
        lora_A: Any,
        lora_B: Any,
        *,
        lora_bias: Any = None,
        lora_scaling: Any,
        lora_dropout: Any = None,
        training: Any,
    ) -> Any:
        """Adds the branch to the operation's value."""
        h = self.input_of(x, lora_A, lora_dropout, training)
        result = add_scaled(y, self.branch(h, operation, lora_A, lora_B, lora_bias), lora_scaling)
        return result.to(y.dtype) if self.casts else result

    def input_of(self, x: Any, lora_A: Any, lora_dropout: Any, training: Any) -> Any:
        """Returns what the branch is given."""
        return input_of(x, lora_A, lora_dropout, training, self.drops, self.casts)

    def branch(self, h: Any, operation: Any, lora_A: Any, lora_B: Any, lora_bias: Any = None) -> Any:
        """Returns what A and B make of the branch's input, without the scale."""
        # an operation that multiplies by the matrix as A and B have it multiplies by them in turn
        is_product = operation.transposed != self.flipped
        product = h @ lora_B @ lora_A if is_product else F.linear(F.linear(h, lora_A), lora_B)
        return product if lora_bias is None else product + lora_bias

    @property
    def constants_by_row(self) -> Mapping[str, float | None]:
        """The constants that `by_row` reads, with what they are for an adapter without them; None for any value."""
        return {"lora_scaling": None} | ({"lora_dropout": 0.0} if self.drops else {})

    def joined(self, rules: Sequence[Any]) -> LoraLinear | None:
        """Returns the rule for a batch whose rows have adapters with these rules, or None if there is none."""
        if self.has_bias:
            return None
        own = dataclasses.replace(self, drops=False, casts=False)
        if any(
            type(rule) is not LoraLinear or dataclasses.replace(rule, drops=False, casts=False) != own for rule in rules
        ):
            return None
        return dataclasses.replace(
            self, drops=any(rule.drops for rule in rules), casts=any(rule.casts for rule in rules)
        )

    def by_row(
        self,
        x: Any,
        y: Any,
        operation: Any,
        lora_A: Any,
        lora_B: Any,
        *,
        lora_scaling: Any,
        lora_dropout: Any = None,
        training: Any,
    ) -> Any:
        """Adds to each row of the operation's value the branch of its own A and B."""
        h = x.to(lora_A.dtype) if self.casts else x
        if self.drops:
            h = as_node(dropped_by_row, h, lora_dropout, training)
        is_product = operation.transposed != self.flipped
        first, second = (lora_B, lora_A) if is_product else (lora_A.mT, lora_B.mT)
        result = as_node(products_by_row, y, h, first, second, lora_scaling)
        return result.to(y.dtype) if self.casts else result

    def unmergeable(self, site: Site) -> str | None:
        """Refuses a bias of B where the operation adds none."""
        return unmergeable_bias(site, self.has_bias)

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s B A, transposed where A and B are those of the transpose."""
        return matrix_delta(self.flipped, lora_A, lora_B, lora_scaling)

    def as_product(self, delta: Any) -> Any:
        """Returns a change of the weight as the matrix B A."""
        return delta.mT if self.flipped else delta

    def bias_delta(self, lora_scaling: Any, lora_bias: Any = None) -> Any:
        """Returns s c, if B has a bias."""
        return bias_change(lora_bias, lora_scaling)


@functools.lru_cache(maxsize=1024)
def matrix_factors(rank: int, rows: int, columns: int, b_is_trained: bool = True) -> Mapping[str, ParameterSpec]:
    """Returns A and B for a weight of shape (rows, columns)."""
    return {
        "lora_A": ParameterSpec((rank, columns), key="lora_A.weight"),
        "lora_B": ParameterSpec((rows, rank), key="lora_B.weight", is_trained=b_is_trained),
    }


def matrix_delta(flipped: bool, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
    """Returns s B A, or its transpose."""
    delta = lora_B @ lora_A * lora_scaling
    return delta.mT if flipped else delta


def products_by_row(y: Tensor, h: Tensor, first: Tensor, second: Tensor, scaling: Any) -> Tensor:
    """Returns y + s · h · first · second, with other matrices for each row.

    Args:
        y: Of shape (rows, …, out).
        h: Of shape (rows, …, in).
        first: Of shape (rows, in, r).
        second: Of shape (rows, r, out).
        scaling: A number, or one for each row.
    """
    down = torch.bmm(h.reshape(h.shape[0], -1, h.shape[-1]), first)
    if isinstance(scaling, Tensor):
        down, scaling = down * scaling.to(down).view(-1, 1, 1), 1
    flat = y.reshape(y.shape[0], -1, y.shape[-1])
    if flat.dtype == down.dtype:
        return torch.baddbmm(flat, down, second, alpha=scaling).view(y.shape)
    return add_scaled(flat, torch.bmm(down, second), scaling).view(y.shape)


def dropped_by_row(h: Tensor, probability: Any, training: bool) -> Tensor:
    """Returns `h` with elements dropped, by one probability or by one for each row."""
    if not isinstance(probability, Tensor):
        return F.dropout(h, probability, training)
    if not training:
        return h
    kept = 1 - probability.to(h).view(-1, *(1 for _ in h.shape[1:]))
    return h * torch.bernoulli(kept.expand_as(h)) / kept
