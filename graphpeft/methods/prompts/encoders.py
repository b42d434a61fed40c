"""Encoders of virtual tokens: a table of them, a small network, or none, where another module's tokens arrive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.rules.parameter_spec import ParameterSpec

EMBEDDINGS_KEY = "prompt_embeddings"
"""The name of the virtual tokens in PEFT's files."""

ENCODER_PREFIX = "prompt_encoder."
"""The prefix of an encoder's own tensors in files; PEFT doesn't save them, and ignores them."""


class Encoder(ABC):
    """Computes the virtual tokens; a frozen value.

    Attributes:
        asks: The names of arguments that the model gets for it, beside its own.
    """

    asks: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def parameters(self, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns its parameters by name."""
        ...

    @abstractmethod
    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Fills new parameters with their first values."""
        ...

    @abstractmethod
    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the virtual tokens, (tokens, dim) or (batch, tokens, dim); it is run on proxies, and on tensors."""
        ...


@dataclass(frozen=True)
class NoPrompt(Encoder):
    """No virtual tokens: another module's tokens arrive at this one."""

    def parameters(self, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns none."""
        return {}

    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Has nothing to fill."""

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns None."""
        return None


@dataclass(frozen=True)
class Table(Encoder):
    """Virtual tokens that are parameters themselves."""

    def shape(self, config: Any) -> tuple[int, int]:
        """Returns the shape of the table: (tokens, dim)."""
        return config.total_tokens, config.token_dim

    def parameters(self, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the table."""
        return {"prompt_embeddings": ParameterSpec(self.shape(config), EMBEDDINGS_KEY, path="embedding.weight")}

    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Draws the table as ``nn.Embedding`` does."""
        nn.init.normal_(parameters["prompt_embeddings"])

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the table."""
        return parameters["prompt_embeddings"]


class NetworkEncoder(Encoder):
    """Virtual tokens that a network computes from the weight of its ``embedding``.

    The network's weights are parameters, with the names of PEFT's encoder in the model and in files.
    """

    @abstractmethod
    def network(self, config: Any) -> nn.Module:
        """Returns the network with its first values, drawn in the order in which PEFT draws them."""
        ...

    def parameters(self, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the learned tokens and the network's weights."""
        with torch.device("meta"):
            named = self.network(config).named_parameters()
        return {
            _local(name): ParameterSpec(tuple(weight.shape), ENCODER_PREFIX + name, path=name) for name, weight in named
        }

    @torch.no_grad()
    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Gives the parameters the first values of the network's weights."""
        with torch.device("cpu"):
            network = self.network(config)
        for name, value in network.named_parameters():
            parameters[_local(name)].copy_(value)


def linear_by(name: str, x: Any, parameters: Mapping[str, Any]) -> Any:
    """Returns the value for `x` of the network's layer `name`, which has underscores for dots."""
    return F.linear(x, parameters[f"prompt_{name}_weight"], parameters[f"prompt_{name}_bias"])


def _local(name: str) -> str:
    return f"prompt_{name.replace('.', '_')}"
