"""LoRA at an embedding.

    y' = y + s · Aᵀ[i] Bᵀ              y = W[i], W of shape (entries, features), A (r, entries), B (features, r)

A starts at zero and B as a normal one, so that the product is zero. There is no dropout: the input is indices.

A table that is named as a parameter has the factors of the matrix that it is, as in PEFT's `target_parameters`:

    y' = y + s · B[i] A                A of shape (r, features), B (entries, r)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graphpeft.methods.lora.factors import scope_of_tied
from graphpeft.methods.lora.init import initialisation
from graphpeft.methods.lora.init.from_weight import minor_directions
from graphpeft.methods.lora.matrix import LoraMatrix
from graphpeft.methods.lora.rule import LoraBranch, bias_refusal
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class LoraTable(LoraBranch, LoraMatrix):
    """The branch of an embedding whose table is a parameter for PEFT, not a layer's weight."""

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses dropout, rows that are shortened, and the same as for a matrix."""
        if config.lora_dropout and not config.inference_mode:
            drops = f"lora_dropout={config.lora_dropout} drops elements of an operation's input"
            return f"{drops}, and that of its {site.attribute} is indices; set lora_dropout=0"
        if site.shortens:
            return "its rows are shortened to max_norm: those of the sum, and not each by itself"
        return super().check(site, config)

    def input_of(self, x: Any, lora_A: Any, lora_dropout: Any, training: Any) -> Any:
        """Returns the indices; dropout has no meaning for them."""
        return x

    def branch(self, h: Any, operation: Any, lora_A: Any, lora_B: Any, lora_bias: Any = None) -> Any:
        """Returns the rows of A's and B's product at the indices."""
        # A and B are no leaves here, and only leaves can have sparse gradients
        rows, columns = (lora_A.T, lora_B.T) if self.flipped else (lora_B, lora_A)
        return operation.apply(h, rows, sparse=False) @ columns


@dataclass(frozen=True, kw_only=True)
class LoraEmbedding(LoraTable):
    """The branch of an embedding; A and B are factors of the table's transpose, as in PEFT."""

    flipped: bool = True

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses a bias of B, and initialisations of matrices but for the one that PEFT has for embeddings."""
        reason = bias_refusal(site, config)
        if reason is None and config.init_lora_weights == "mica":
            return initialisation.refusal(site, config, self.flipped)
        return reason or initialisation.refusal_unless_random(config, "an embedding")

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B; embeddings that are tied to each other share them."""
        keys = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        return {
            name: spec._replace(key=keys[name], scope=scope_of_tied(site, name))
            for name, spec in super().parameters(site, config).items()
        }

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

    def unmergeable(self, site: Site) -> str | None:
        """Refuses tables whose rows are shortened when they are read: a merged table shortens rows of the sum."""
        return "its rows are shortened to max_norm, the table's and A's each by itself" if site.shortens else None
