"""LoRA of kernels that a model computes with, as modulated and dynamic convolutions do.

    W' = W + s · B A        W of shape (…, in, *kernel), as a matrix whose columns are the last three dimensions

The model may use them in any way, so there is no input that dropout could drop elements of. PEFT has no LoRA for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphpeft.methods.lora.factors import rank_of
from graphpeft.methods.lora.init import initialisation
from graphpeft.methods.lora.matrix import matrix_factors
from graphpeft.methods.lora.rule import Combines, LoraRule, variant_refusal
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class LoraKernels(LoraRule, Combines):
    """The change of a weight with four dimensions or more.

    Attributes:
        shape: The weight's shape.
    """

    shape: tuple[int, ...]

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses dropout, variants, and initialisations of matrices."""
        what = "a kernel that a model computes with"
        reason = super().check(site, config) or variant_refusal(config, what)
        return reason or initialisation.refusal_unless_random(config, what)

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        return matrix_factors(rank_of(site, config), math.prod(self.shape[:-3]), math.prod(self.shape[-3:]))

    def stored(self, product: Any) -> Any:
        """Returns the product's result in the shape of the weight."""
        return product.reshape(self.shape)

    def as_product(self, delta: Any) -> Any:
        """Returns a change of the weight as the matrix B A."""
        return delta.flatten(-3).flatten(0, -2)
