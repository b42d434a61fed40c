"""LoRA at an embedding.

    y = W[i] + s · Aᵀ[i] Bᵀ              W of shape (entries, features), A (r, entries), B (features, r)

A starts at zero and B as a normal one, so that the product is zero. There is no dropout: the input is indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.methods.lora.factors import constants_of, rank_of
from graphpeft.rewrite import ParameterSpec
from graphpeft.sites import Site


@dataclass(frozen=True)
class LoraEmbedding:
    """The branch of an embedding.

    Attributes:
        casts: Whether the dtype of A and B differs from the table's.
    """

    casts: bool

    rank_axes = (0, 1)

    def check(self, site: Site, config: Any) -> str | None:
        """Every embedding can be adapted."""
        return None

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        rank = rank_of(site, config)
        entries, features = site.shape
        return {
            "lora_A": ParameterSpec((rank, entries), key="lora_embedding_A"),
            "lora_B": ParameterSpec((features, rank), key="lora_embedding_B"),
        }

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the scale."""
        return constants_of(site, config)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and B as PEFT does."""
        A, B = parameters["lora_A"], parameters["lora_B"]
        A.normal_()
        B.normal_()
        if config.init_lora_weights is not False:
            A.zero_()
            B.normal_()

    def rewrite(self, x: Any, y: Any, operation: Any, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Adds the branch to the operation's value."""
        result = torch.add(y, operation.apply(x, lora_A.T) @ lora_B.T, alpha=lora_scaling)
        return result.to(y.dtype) if self.casts else result

    def unmergeable(self, site: Site) -> str | None:
        """Every change can be merged."""
        return None

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s (B A)ᵀ."""
        return (lora_B @ lora_A).T * lora_scaling

    def as_product(self, delta: Any) -> Any:
        """Returns a change of the table as the matrix B A."""
        return delta.T
