"""Prefix tuning: learned keys and values in front of the keys and values of every layer's attention.

    cache[layer] = (P[2 · layer], P[2 · layer + 1])            P of shape (2 · layers, heads, tokens, head size)

They are the content of the cache before the first token. With `prefix_projection` a perceptron computes P from a
smaller table. Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190;
the same numbers as PEFT's ``tuners/prefix_tuning/model.py`` and ``peft_model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.methods.prompts.encoders import Encoder, NetworkEncoder, Table, linear_by
from graphpeft.methods.prompts.prefix_config import PrefixConfig
from graphpeft.rules.options import Size
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register


@register
@dataclass(kw_only=True)
class PrefixTuningConfig(PrefixConfig):
    """Prefix tuning's options; the names, defaults and meanings are PEFT's.

    Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.

    Attributes:
        init_weights: ``"zero"`` begins with keys and values of zero; None draws them.
        encoder_hidden_size: The width of the perceptron; `token_dim` if None.
        prefix_projection: Whether a perceptron computes the prefix.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, prefix_projection=True)
    """

    peft_type: ClassVar[PeftType] = PeftType.PREFIX_TUNING

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: Size | None = None
    prefix_projection: bool = False

    def resolved(self, model: nn.Module) -> PrefixTuningConfig:
        """Returns the config with the sizes of the model's keys and values filled in."""
        config = super().resolved(model)
        assert isinstance(config, PrefixTuningConfig)
        if config.encoder_hidden_size is None:
            config.encoder_hidden_size = config.token_dim
        return config

    @property
    def has_encoder(self) -> bool:
        """Whether something computes the virtual tokens in training."""
        return self.prefix_projection

    def encoder(self) -> Encoder:
        """Returns the encoder of the prefix in training."""
        return Projection() if self.prefix_projection else PrefixTable()

    def encoder_in_use(self) -> Encoder:
        """Returns the encoder in use: that of training, or the table that it has computed."""
        return PrefixTable() if self.holds_table else self.encoder()


@dataclass(frozen=True)
class PrefixTable(Table):
    """Keys and values that are parameters themselves."""

    def shape(self, config: Any) -> tuple[int, int]:
        """Returns the shape of the table: (tokens, 2 · layers · heads · head size)."""
        return config.num_virtual_tokens, config.width

    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Draws the table as ``nn.Embedding`` does, or makes it zero."""
        super().initialise(parameters, config, embedding)
        if config.init_weights == "zero":
            nn.init.zeros_(parameters["prompt_embeddings"])


@dataclass(frozen=True)
class Projection(NetworkEncoder):
    """Keys and values that a perceptron with one hidden layer computes."""

    def network(self, config: Any) -> nn.Module:
        """Returns the learned tokens and the perceptron."""
        dim, hidden = config.token_dim, config.encoder_hidden_size
        embedding = nn.Embedding(config.num_virtual_tokens, dim)
        layers = (nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, config.width))
        return nn.ModuleDict({"embedding": embedding, "transform": nn.Sequential(*layers)})

    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Draws them; the last layer begins with zeros where the config says so."""
        super().initialise(parameters, config, embedding)
        if config.init_weights == "zero":
            nn.init.zeros_(parameters["prompt_transform_2_weight"])
            nn.init.zeros_(parameters["prompt_transform_2_bias"])

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the keys and values, (tokens, 2 · layers · heads · head size)."""
        hidden = torch.tanh(linear_by("transform_0", parameters["prompt_embedding_weight"], parameters))
        return linear_by("transform_2", hidden, parameters)
