"""LoRA at an embedding.

    y = W[i] + s · Aᵀ[i] Bᵀ              W of shape (entries, features), A (r, entries), B (features, r)

A starts at zero and B as a normal one, so that the product is zero. There is no dropout: the input is indices.

A table that is named as a parameter has the factors of the matrix that it is, as in PEFT's `target_parameters`:

    y = W[i] + s · B[i] A                A of shape (r, features), B (entries, r)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.methods.lora import initialisation
from graphpeft.methods.lora.factors import constants_of, rank_of, refused_bias
from graphpeft.methods.lora.from_weight import minor_directions
from graphpeft.methods.lora.linear import matrix_delta, matrix_factors
from graphpeft.rules.rule import Combines, Mergeable, OperationRule, ParameterSpec, ReplacesWeight
from graphpeft.sites.site import Site


@dataclass(frozen=True)
class LoraEmbedding(OperationRule, Mergeable, Combines):
    """The branch of an embedding.

    Attributes:
        casts: Whether the dtype of A and B differs from the table's.
    """

    casts: bool

    drops: ClassVar[bool] = False

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses a bias of B, and what an initialisation refuses."""
        reason = refused_bias(site, config)
        return reason or initialisation.refused_of_embedding(site, config)

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B; at an embedding that is tied to another one, the other's."""
        rank, is_trained = rank_of(site, config), initialisation.b_is_trained(config)
        entries, features = site.shape
        shared = ("lora_A", "lora_B") if site.tied_to is not None else (None, None)
        return {
            "lora_A": ParameterSpec((rank, entries), "lora_embedding_A", shared=shared[0]),
            "lora_B": ParameterSpec((features, rank), "lora_embedding_B", is_trained, shared=shared[1]),
        }

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the scale."""
        return constants_of(site, config)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Gives A and B the values that PEFT gives them."""
        A, B = parameters["lora_A"], parameters["lora_B"]
        A.normal_()
        B.normal_()
        if config.init_lora_weights is False:
            return
        A.zero_()
        if config.init_lora_weights == "mica":
            B.copy_(minor_directions(initialisation.weight_of(site, module).T, B.shape[1]))
        else:
            B.normal_()

    def rewrite(self, x: Any, y: Any, operation: Any, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Adds the branch to the operation's value."""
        result = add_scaled(y, self.branch(x, operation, lora_A, lora_B), lora_scaling)
        return result.to(y.dtype) if self.casts else result

    def input_of(self, x: Any, lora_A: Any, lora_dropout: Any, training: Any) -> Any:
        """Returns what the branch is given: indices, of which none is dropped."""
        return x

    def branch(self, h: Any, operation: Any, lora_A: Any, lora_B: Any, lora_bias: Any = None) -> Any:
        """Returns what A and B make of the indices, without the scale."""
        # A isn't a leaf of its own, to which a sparse gradient could go
        return operation.apply(h, lora_A.T, sparse=False) @ lora_B.T

    def unmergeable(self, site: Site) -> str | None:
        """Refuses tables whose rows are shortened as they are read: those of the sum, and not each by itself."""
        return "its rows are shortened to max_norm, the table's and A's each by itself" if site.shortens else None

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s (B A)ᵀ."""
        return (lora_B @ lora_A).T * lora_scaling

    def as_product(self, delta: Any) -> Any:
        """Returns a change of the table as the matrix B A."""
        return delta.T


@dataclass(frozen=True)
class LoraTable(OperationRule, Mergeable, ReplacesWeight, Combines):
    """The branch of an embedding whose table is a parameter for PEFT, not a layer's weight.

    Attributes:
        casts: Whether the dtype of A and B differs from the table's.
    """

    casts: bool

    drops: ClassVar[bool] = False

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses dropout, a bias of B, rows that are shortened, and what an initialisation refuses."""
        if config.lora_dropout and not config.inference_mode:
            drops = f"lora_dropout={config.lora_dropout} drops elements of an operation's input"
            return f"{drops}, and that of its {site.attribute} is indices; set lora_dropout=0"
        if site.shortens:
            return "its rows are shortened to max_norm: those of the sum, and not each by itself"
        return refused_bias(site, config) or initialisation.refused(site, config, flipped=False)

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        entries, features = site.shape
        return matrix_factors(rank_of(site, config), entries, features, initialisation.b_is_trained(config))

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the scale."""
        return constants_of(site, config)

    def replaces(self, site: Site, config: Any) -> bool:
        """Tells whether A and B start with a part of the table, which is then taken from it."""
        return initialisation.replaces_weight(config)

    def initialise(
        self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, Tensor] | None:
        """Gives A and B the values that PEFT gives them."""
        return initialisation.initialise(parameters, site, config, module, flipped=False)

    def rewrite(self, x: Any, y: Any, operation: Any, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Adds the branch to the operation's value."""
        result = add_scaled(y, self.branch(x, operation, lora_A, lora_B), lora_scaling)
        return result.to(y.dtype) if self.casts else result

    def input_of(self, x: Any, lora_A: Any, lora_dropout: Any, training: Any) -> Any:
        """Returns what the branch is given: indices, of which none is dropped."""
        return x

    def branch(self, h: Any, operation: Any, lora_A: Any, lora_B: Any, lora_bias: Any = None) -> Any:
        """Returns what A and B make of the indices, without the scale."""
        return operation.apply(h, lora_B, sparse=False) @ lora_A

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s B A."""
        return matrix_delta(False, lora_A, lora_B, lora_scaling)

    def as_product(self, delta: Any) -> Any:
        """Returns a change of the table as the matrix B A."""
        return delta
