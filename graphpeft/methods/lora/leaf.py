"""LoRA at the call of a module whose inside is its own affair.

y = module(x) + s · dropout(x) Aᵀ Bᵀ

The module may be a quantised layer, one whose forward is an operation of its own, or a wrapper around a layer. Its
weight, if it has one, isn't changed, so the branch can't be merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.methods.lora.factors import constants_of, draw, rank_of, refused_unless_plain
from graphpeft.methods.lora.linear import matrix_factors
from graphpeft.rewrite import ParameterSpec, WeightRule
from graphpeft.sites import LeafSite


@dataclass(frozen=True)
class LoraLeaf(WeightRule):
    """The branch of a call.

    Attributes:
        drops: Whether the branch has dropout.
    """

    drops: bool

    def check(self, site: LeafSite, config: Any) -> str | None:
        """Refuses what needs a weight."""
        return refused_unless_plain(config, "the call of a module")

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
        self, x: Any, y: Any, lora_A: Any, lora_B: Any, lora_scaling: Any, lora_dropout: Any, training: Any
    ) -> Any:
        """Adds the branch to what the call returns."""
        # what a module is given and returns can be in another dtype than its own tensors
        h = x.to(lora_A.dtype)
        if self.drops:
            h = F.dropout(h, lora_dropout, training)
        return torch.add(y, F.linear(F.linear(h, lora_A), lora_B), alpha=lora_scaling).to(y.dtype)
