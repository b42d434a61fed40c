"""The tokens of a context, whose embeddings are moved by a learned change of bounded length.

tokens = E[ids] + δ,        ‖δᵢ‖ ≤ ε(type of token i) · √(dim / 2048)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompts.encoders import ENCODER_PREFIX, Encoder, Table
from graphpeft.rules.parameter_spec import ParameterSpec

EMBEDDING, DELTA = f"{ENCODER_PREFIX}embedding.weight", f"{ENCODER_PREFIX}delta_embedding.weight"
"""The names in files of the embeddings of the tokens, and of their change."""

_SMALLEST = 1e-10
"""The bound of tokens that aren't moved."""


@dataclass(frozen=True)
class Context(Encoder):
    """The tokens of a context with their change.

    Attributes:
        types: The types of the tokens.
        epsilon: ε for inputs.
        format_epsilon: ε for templates.
    """

    types: tuple[int, ...]
    epsilon: float
    format_epsilon: float

    def parameters(self, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the embeddings, which aren't trained, and their change, which is."""
        table = Table().parameters(config)["prompt_embeddings"]
        return {
            "prompt_embedding": table._replace(key=EMBEDDING, is_trained=False, is_counted=True),
            "prompt_delta": table._replace(key=DELTA, path="delta_embedding.weight"),
        }

    @torch.no_grad()
    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Takes the embeddings of the context's tokens, and no change."""
        weight: Any = embedding.weight
        parameters["prompt_embedding"].copy_(embedding(torch.tensor(config.cpt_token_ids, device=weight.device)))
        parameters["prompt_delta"].zero_()

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the moved tokens."""
        epsilons = (self.epsilon, self.format_epsilon)
        return parameters["prompt_embedding"] + bounded(parameters["prompt_delta"], self.types, epsilons, training)


@recorded
def bounded(delta: Tensor, types: tuple[int, ...], epsilons: tuple[float, float], training: bool) -> Tensor:
    """Returns a change whose rows are no longer than the bounds of their types; only those with a bound are trained.

    In training the parameter itself is shortened, as in PEFT, so that the optimizer goes on from there.
    """
    scale = math.sqrt(delta.shape[1] / 2048)
    by_type = (_SMALLEST, epsilons[1] * scale, epsilons[0] * scale, epsilons[1] * scale)
    bounds = delta.new_tensor([by_type[kind % 4] if kind > 0 else _SMALLEST for kind in types])
    with torch.no_grad():
        lengths = delta.norm(dim=1)
        shortened = torch.where(lengths > 0, bounds / torch.maximum(lengths, bounds), 1.0)[:, None] * delta
        if training:
            delta.copy_(shortened)
    moves = delta.new_tensor([kind % 4 != 0 for kind in types])[:, None]
    # the values are shortened, and only the rows that move get gradients
    return shortened + moves * (delta - delta.detach())
