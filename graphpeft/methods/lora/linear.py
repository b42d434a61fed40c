"""LoRA at a linear operation.

y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.methods.lora.factors import constants_of, initialise, rank_of
from graphpeft.rewrite import ParameterSpec
from graphpeft.sites import Site


@dataclass(frozen=True)
class LoraLinear:
    """The branch of a linear operation.

    The weight is (m, n), A is (r, n) and B is (m, r), so that ΔW = s B A. A layer that stores its weight as (in, out)
    has the shapes of its transpose, and so A is (r, in) and B (out, r) in every layer, as in PEFT. For a plain
    parameter they don't depend on how it is used, as in PEFT's `target_parameters`.

    Attributes:
        flipped: Whether A and B are those of the weight's transpose.
        drops: Whether the branch has dropout.
        casts: Whether the dtype of A and B differs from the weight's.
    """

    flipped: bool
    drops: bool
    casts: bool

    rank_axes = (0, 1)

    def check(self, site: Site, config: Any) -> str | None:
        """Every linear operation can be adapted."""
        return None

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        return matrix_factors(rank_of(site, config), *(reversed(site.shape) if self.flipped else site.shape))

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the scale, and the probability of dropout if there is one."""
        return constants_of(site, config, self.drops)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and B as PEFT does."""
        initialise(parameters, site, config)

    def rewrite(
        self,
        x: Any,
        y: Any,
        operation: Any,
        lora_A: Any,
        lora_B: Any,
        lora_scaling: Any,
        lora_dropout: Any,
        training: Any,
    ) -> Any:
        """Adds the branch to the operation's value."""
        h = x.to(lora_A.dtype) if self.casts else x
        if self.drops:
            h = F.dropout(h, lora_dropout, training)
        # an operation that multiplies by the matrix as A and B have it multiplies by them in turn
        is_product = operation.transposed != self.flipped
        product = h @ lora_B @ lora_A if is_product else F.linear(F.linear(h, lora_A), lora_B)
        result = torch.add(y, product, alpha=lora_scaling)
        return result.to(y.dtype) if self.casts else result

    def unmergeable(self, site: Site) -> str | None:
        """Every change can be merged."""
        return None

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s B A, transposed where A and B are those of the transpose."""
        return matrix_delta(self.flipped, lora_A, lora_B, lora_scaling)

    def as_product(self, delta: Any) -> Any:
        """Returns a change of the weight as the matrix B A."""
        return delta.mT if self.flipped else delta


@functools.lru_cache(maxsize=1024)
def matrix_factors(rank: int, rows: int, columns: int) -> Mapping[str, ParameterSpec]:
    """Returns A and B for a weight of shape (rows, columns)."""
    return {
        "lora_A": ParameterSpec((rank, columns), key="lora_A.weight"),
        "lora_B": ParameterSpec((rows, rank), key="lora_B.weight"),
    }


def matrix_delta(flipped: bool, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
    """Returns s B A, or its transpose."""
    delta = lora_B @ lora_A * lora_scaling
    return delta.mT if flipped else delta
