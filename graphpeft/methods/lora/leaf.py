"""LoRA at the call of a module whose inside is its own affair.

y = module(x) + s · dropout(x) Aᵀ Bᵀ

The module may be a quantised layer, one whose forward is an operation of its own, or a wrapper around a layer. Its
weight, if it has one, isn't changed, so the branch can't be merged. The numbers are those of PEFT's
``tuners/lora/bnb.py`` and ``tuners/lora/torchao.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import as_node
from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.methods.lora.factors import constants_of, draw, rank_of, refused_unless_plain
from graphpeft.methods.lora.linear import dropped_by_row, matrix_factors, products_by_row
from graphpeft.rules.rule import OperationRule, ParameterSpec, RunsByRow
from graphpeft.sites.site import LeafSite


@dataclass(frozen=True)
class LoraLeaf(OperationRule, RunsByRow):
    """The branch of a call.

    Attributes:
        drops: Whether the branch has dropout.
    """

    drops: bool

    def check(self, site: LeafSite, config: Any) -> str | None:
        """Refuses what needs a weight."""
        return refused_unless_plain(config, site.kind)

    def parameters(self, site: LeafSite, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        return matrix_factors(rank_of(site, config), site.out_features, site.in_features)

    def constants(self, site: LeafSite, config: Any) -> Mapping[str, float]:
        """Returns the scale, and the probability of dropout if there is one."""
        return constants_of(site, config, self.drops)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and B as PEFT does."""
        draw(parameters, config.init_lora_weights, rank_of(site, config))

    def rewrite(
        self, x: Any, y: Any, lora_A: Any, lora_B: Any, *, lora_scaling: Any, lora_dropout: Any = None, training: Any
    ) -> Any:
        """Adds the branch to what the call returns."""
        # what a module is given and returns can be in another dtype than its own tensors
        h = x.to(lora_A.dtype)
        if self.drops:
            h = F.dropout(h, lora_dropout, training)
        return add_scaled(y, F.linear(F.linear(h, lora_A), lora_B), lora_scaling).to(y.dtype)

    @property
    def constants_by_row(self) -> Mapping[str, float | None]:
        """The constants that `by_row` reads, with what they are for an adapter without them; None for any value."""
        return {"lora_scaling": None} | ({"lora_dropout": 0.0} if self.drops else {})

    def joined(self, rules: Sequence[Any]) -> LoraLeaf | None:
        """Returns the rule for a batch whose rows have adapters with these rules, or None if there is none."""
        if any(type(rule) is not LoraLeaf for rule in rules):
            return None
        return LoraLeaf(any(rule.drops for rule in rules))

    def by_row(
        self, x: Any, y: Any, lora_A: Any, lora_B: Any, *, lora_scaling: Any, lora_dropout: Any = None, training: Any
    ) -> Any:
        """Adds to each row of what the call returns the branch of its own A and B."""
        h = x.to(lora_A.dtype)
        if self.drops:
            h = as_node(dropped_by_row, h, lora_dropout, training)
        return as_node(products_by_row, y, h, lora_A.mT, lora_B.mT, lora_scaling).to(y.dtype)
