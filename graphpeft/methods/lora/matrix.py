"""LoRA of a weight itself, whatever is done with it.

    W' = W + s · B A                     W of shape (m, n)
    W'_e = W_e + s · B_e A_e             W of shape (experts, out, in), or (experts, in, out) where it is transposed

The latter is PEFT's `target_parameters` for experts, whose factors lie in two matrices: A of shape (experts · r, in)
and B of shape (out, r · experts); source: ``ParamWrapper.get_delta_weight`` in PEFT's ``tuners/lora/layer.py``. There
is no input that dropout could drop elements of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.methods.lora import initialisation
from graphpeft.methods.lora.factors import constants_of, draw, rank_of, refused_bias, refused_dropout, refused_inside
from graphpeft.methods.lora.linear import matrix_delta, matrix_factors
from graphpeft.rules.rule import Combines, Mergeable, ParameterSpec, ReplacesWeight
from graphpeft.sites.site import Site


@dataclass(frozen=True)
class LoraMatrix(Mergeable, ReplacesWeight, Combines):
    """The change of a matrix.

    Attributes:
        flipped: Whether A and B are those of the weight's transpose, as in a layer that stores it as (in, out).
    """

    flipped: bool

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses what is no matrix, dropout, a bias of B, and what an initialisation refuses."""
        if len(site.shape) != 2:
            return f"its {site.attribute} is no matrix, as LoRA's change is, but has the shape {site.shape}"
        reason = refused_inside(site, config) or refused_dropout(site, config) or refused_bias(site, config)
        return reason or initialisation.refused(site, config, self.flipped)

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        rows, columns = reversed(site.shape) if self.flipped else site.shape
        return matrix_factors(rank_of(site, config), rows, columns, initialisation.b_is_trained(config))

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the scale."""
        return constants_of(site, config)

    def replaces(self, site: Site, config: Any) -> bool:
        """Tells whether A and B start with a part of the weight, which is then taken from it."""
        return initialisation.replaces_weight(config)

    def initialise(
        self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, Tensor] | None:
        """Gives A and B the values that PEFT gives them."""
        return initialisation.initialise(parameters, site, config, module, self.flipped)

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s B A, transposed where A and B are those of the transpose."""
        return matrix_delta(self.flipped, lora_A, lora_B, lora_scaling)

    def as_product(self, delta: Any) -> Any:
        """Returns a change of the weight as the matrix B A."""
        return delta.mT if self.flipped else delta


@dataclass(frozen=True)
class LoraExperts(Mergeable):
    """The change of a stack of matrices, one for each expert.

    Attributes:
        experts: How many there are.
        transposed: Whether each is stored as (in, out).
    """

    experts: int
    transposed: bool

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses dropout, a bias of B, and initialisations of a single matrix."""
        reason = refused_dropout(site, config) or refused_bias(site, config)
        return reason or initialisation.refused_unless_random(config, "a stack of matrices")

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        sides = site.shape[1:]
        rows, columns = reversed(sides) if self.transposed else sides
        return matrix_factors(rank_of(site, config) * self.experts, rows, columns)

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the scale."""
        return constants_of(site, config)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and B as PEFT does."""
        draw(parameters, config.init_lora_weights, rank_of(site, config))

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s B_e A_e of each expert."""
        A = lora_A.reshape(self.experts, -1, lora_A.shape[-1])
        B = lora_B.reshape(lora_B.shape[0], -1, self.experts)
        equation = "ore,eri->eio" if self.transposed else "ore,eri->eoi"
        return torch.einsum(equation, B, A) * lora_scaling
