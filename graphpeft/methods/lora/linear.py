"""LoRA at a linear operation, and at the call of a module that stands for one.

    y' = y + s · (dropout(x) Aᵀ Bᵀ + c)            y = x Wᵀ + b, or module(x);  c: the bias of B, with `lora_bias` alone

The module may be a quantised layer, one whose forward is an operation of its own, or a wrapper around a layer. Its
branch has no bias, and can be merged only into a quantised weight that can be quantised anew. The numbers are those of
PEFT's ``tuners/lora/bnb.py`` and ``tuners/lora/torchao.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from graphpeft.graph.changed_products import dropped_by_row, products_by_row
from graphpeft.graph.recorded import as_node
from graphpeft.methods.lora.factors import rank_of
from graphpeft.methods.lora.matrix import LoraMatrix, matrix_factors
from graphpeft.methods.lora.rule import LoraBranch, LoraBranchWithBias, LoraOfMatrices, variant_refusal
from graphpeft.rules.parameter_spec import Dropout, ParameterSpec
from graphpeft.rules.rule import RunsByRow
from graphpeft.sites.site import LeafSite, Site


@dataclass(frozen=True, kw_only=True)
class _ByRow(LoraBranch, RunsByRow):
    """A branch of two matrices; each row of a batch can have its own."""

    zeros_change_nothing: ClassVar[bool] = True

    @property
    def constants_by_row(self) -> Mapping[str, float | None]:
        """The constants that `by_row` reads, with their value for an adapter without them; None for any value."""
        return {"lora_scaling": None} | ({"lora_dropout": Dropout(0.0)} if self.drops else {})

    def joined(self, rules: Sequence[Any]) -> Any:
        """Returns the rule for a batch whose rows have adapters with these rules, or None if there is none."""
        if any(type(rule) is not type(self) for rule in rules):
            return None
        if len({dataclasses.replace(rule, drops=False, casts=False) for rule in (self, *rules)}) > 1:
            return None
        drops, casts = any(rule.drops for rule in rules), any(rule.casts for rule in rules)
        return dataclasses.replace(self, drops=drops, casts=casts)

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
    ) -> Any:
        """Adds to each row of the operation's value the branch of its own A and B."""
        h = x.to(lora_A.dtype) if self.casts else x
        if self.drops:
            h = as_node(dropped_by_row, h, lora_dropout)
        first, second = self.factored(lora_A, lora_B).halves()
        if operation.transposed == self.flipped:
            first, second = second.mT, first.mT
        result = as_node(products_by_row, y, h, first, second, lora_scaling)
        return result.to(y.dtype) if self.casts else result


@dataclass(frozen=True, kw_only=True)
class LoraLinear(LoraBranchWithBias, _ByRow, LoraMatrix):
    """The branch of a linear operation."""

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, and the bias of B if there is one."""
        factors = super().parameters(site, config)
        return {**factors, **self.bias_parameter(factors["lora_B"].shape[0])} if self.has_bias else factors

    def joined(self, rules: Sequence[Any]) -> LoraLinear | None:
        """Returns the rule for a batch whose rows have adapters with these rules; None with a bias of B."""
        return None if self.has_bias else super().joined(rules)


@dataclass(frozen=True, kw_only=True)
class LoraLeaf(_ByRow, LoraOfMatrices):
    """The branch of a call; it can be merged if the module has a weight whose codes can be made anew."""

    # a module's input and output can be in another dtype than its own tensors
    casts: bool = True

    def check(self, site: LeafSite, config: Any) -> str | None:
        """Refuses variants, which need a weight; numbers of a quantised one are enough for the lengths of DoRA."""
        return variant_refusal(config, site.kind, ("lora_bias",) if site.is_recoded else ("use_dora", "lora_bias"))

    def parameters(self, site: LeafSite, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        return matrix_factors(rank_of(site, config), site.out_features, site.in_features)
