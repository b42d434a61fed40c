"""LoRA of a weight itself, whatever the model does with it.

    W' = W + s · B A                     W of shape (m, n), A (r, n), B (m, r)
    W'_e = W_e + s · B_e A_e             W of shape (experts, out, in), or (experts, in, out) where it is transposed

The latter is PEFT's `target_parameters` for experts, whose factors lie in two matrices: A of shape (experts · r, in)
and B of shape (out, r · experts); source: ``ParamWrapper.get_delta_weight`` in PEFT's ``tuners/lora/layer.py``. A
product with a stack, or with a linear layer's weight, has an input, of which dropout drops elements; another use of a
weight has none.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graphpeft.methods.lora.factors import rank_of
from graphpeft.methods.lora.init import initialisation
from graphpeft.methods.lora.init.initialisation import traits_of
from graphpeft.methods.lora.rule import LoraOfMatrices, bias_refusal, variant_refusal
from graphpeft.rules.parameter_spec import ParameterSpec, RankAxis
from graphpeft.rules.products import Product
from graphpeft.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class LoraMatrix(LoraOfMatrices):
    """The change of a matrix."""

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses other shapes, variants for layers, and the same as the initialisation."""
        if len(site.shape) != 2:
            return f"its {site.attribute} is no matrix, as LoRA's change is, but has the shape {site.shape}"
        inside = variant_refusal(config, "one of several weights of a module") if site.named is not None else None
        reason = inside or (bias_refusal(site, config) if self.drops else super().check(site, config))
        return reason or initialisation.refusal(site, config, self.flipped)

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        rows, columns = reversed(site.shape) if self.flipped else site.shape
        return matrix_factors(rank_of(site, config), rows, columns, traits_of(config).trains_b)

    def replaces(self, site: Site, config: Any) -> bool:
        """Returns whether the initialisation replaces the weight."""
        return traits_of(config).replaces_weight

    def initialise(
        self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, Tensor] | None:
        """Gives A and B the values that PEFT gives them, and returns the residual of the weight, if there is one."""
        return initialisation.initialise(parameters, site, config, module, self.flipped)


@dataclass(frozen=True, kw_only=True)
class LoraExperts(LoraOfMatrices):
    """The change of a stack of matrices, one for each expert.

    Attributes:
        experts: The number of experts.
    """

    experts: int

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses a bias of B, and initialisations of a single matrix."""
        return bias_refusal(site, config) or initialisation.refusal_unless_random(config, "a stack of matrices")

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B of all experts."""
        sides = site.shape[1:]
        rows, columns = reversed(sides) if self.flipped else sides
        factors = matrix_factors(rank_of(site, config) * self.experts, rows, columns)
        ranks = {"lora_A": RankAxis(0, self.experts), "lora_B": RankAxis(1, self.experts, interleaved=True)}
        return {name: spec._replace(rank=ranks[name]) for name, spec in factors.items()}

    def factored(self, lora_A: Any, lora_B: Any) -> Product:
        """Returns B_e A_e of each expert."""
        A = lora_A.reshape(self.experts, -1, lora_A.shape[-1])
        B = lora_B.reshape(lora_B.shape[0], -1, self.experts).permute(2, 0, 1)
        return Product((B, A))


@functools.lru_cache(maxsize=1024)
def matrix_factors(rank: int, rows: int, columns: int, trains_b: bool = True) -> Mapping[str, ParameterSpec]:
    """Returns A, (rank, columns), and B, (rows, rank), for a weight of shape (rows, columns)."""
    return {
        "lora_A": ParameterSpec((rank, columns), key="lora_A.weight", rank=RankAxis(0)),
        "lora_B": ParameterSpec((rows, rank), key="lora_B.weight", is_trained=trains_b, rank=RankAxis(1)),
    }
