"""P-tuning: virtual tokens that a small network computes from learned ones.

    tokens = W₃ relu(W₂ relu(W₁ e + b₁) + b₂) + b₃              e of shape (tokens, dim)       MLP
    tokens = W₂ relu(W₁ lstm(e) + b₁) + b₂                      lstm in both directions        LSTM

Source: Liu et al., "GPT Understands, Too", arXiv 2103.10385; the same numbers as PEFT's
``tuners/p_tuning/model.py``.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompts.encoders import Encoder, NetworkEncoder, linear_by
from graphpeft.methods.prompts.prompt_config import PromptLearningConfig
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.options import Probability, Size, Steps
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register

_MLP_LAYERS = 2


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The encoders of `PromptEncoderConfig`.

    Examples:
        >>> PromptEncoderReparameterizationType.LSTM == "LSTM"
        True
    """

    MLP = "MLP"
    LSTM = "LSTM"


@register
@dataclass(kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning's options; the names, defaults and meanings are PEFT's.

    Source: Liu et al., "GPT Understands, Too", arXiv 2103.10385.

    Attributes:
        encoder_reparameterization_type: ``"MLP"`` or ``"LSTM"``.
        encoder_hidden_size: The width of the network; `token_dim` if None.
        encoder_num_layers: The layers of the LSTM.
        encoder_dropout: The probability of dropping an element between them.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, encoder_hidden_size=16)
    """

    peft_type: ClassVar[PeftType] = PeftType.P_TUNING

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: Size | None = None
    encoder_num_layers: Steps = 2
    encoder_dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_reparameterization_type == "MLP" and self.encoder_num_layers != _MLP_LAYERS:
            warnings.warn(
                f"encoder_num_layers is for an LSTM; an MLP has {_MLP_LAYERS} hidden layers",
                PeftWarning,
                stacklevel=3,
            )

    def resolved(self, model: nn.Module) -> PromptEncoderConfig:
        """Returns the config with the sizes of the model filled in."""
        config = super().resolved(model)
        assert isinstance(config, PromptEncoderConfig)
        if config.encoder_hidden_size is None:
            config.encoder_hidden_size = config.token_dim
        return config

    @property
    def has_encoder(self) -> bool:
        """Whether something computes the virtual tokens in training."""
        return True

    def encoder(self) -> Encoder:
        """Returns the network that computes the virtual tokens."""
        if self.encoder_reparameterization_type == "MLP":
            return MLP()
        return LSTM(self.encoder_num_layers, self.encoder_dropout)


@dataclass(frozen=True)
class MLP(NetworkEncoder):
    """Computes virtual tokens by a perceptron with two hidden layers."""

    def network(self, config: Any) -> nn.Module:
        """Returns the learned tokens and the perceptron."""
        dim, hidden = config.token_dim, config.encoder_hidden_size or config.token_dim
        embedding = nn.Embedding(config.total_tokens, dim)
        layers = (nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        return nn.ModuleDict({"embedding": embedding, "mlp_head": nn.Sequential(*layers)})

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the virtual tokens."""
        h = F.relu(linear_by("mlp_head_0", parameters["prompt_embedding_weight"], parameters))
        return linear_by("mlp_head_4", F.relu(linear_by("mlp_head_2", h, parameters)), parameters)


@dataclass(frozen=True)
class LSTM(NetworkEncoder):
    """Computes virtual tokens by an LSTM in both directions and a perceptron with one hidden layer.

    Attributes:
        layers: Its layers.
        dropout: The probability of dropping an element between them.
    """

    layers: int
    dropout: float

    def network(self, config: Any) -> nn.Module:
        """Returns the learned tokens, the LSTM and the perceptron."""
        dim, hidden = config.token_dim, config.encoder_hidden_size or config.token_dim
        embedding = nn.Embedding(config.total_tokens, dim)
        options: dict[str, Any] = {"dropout": self.dropout, "bidirectional": True, "batch_first": True}
        recurrent = nn.LSTM(dim, hidden, self.layers, **options)
        layers = (nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))
        return nn.ModuleDict({"embedding": embedding, "lstm_head": recurrent, "mlp_head": nn.Sequential(*layers)})

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the virtual tokens."""
        weights = [value for name, value in parameters.items() if name.startswith("prompt_lstm_head")]
        h = lstm(parameters["prompt_embedding_weight"], weights, self.layers, self.dropout, training)
        return linear_by("mlp_head_2", F.relu(linear_by("mlp_head_0", h, parameters)), parameters)


@recorded
def lstm(tokens: Tensor, weights: list[Tensor], layers: int, dropout: float, training: bool) -> Tensor:
    """Returns the outputs, (tokens, 2 · hidden), of an LSTM in both directions.

    Args:
        tokens: Its inputs, (tokens, dim).
        weights: Its weights in the order of ``nn.LSTM``.
        layers: The number of layers.
        dropout: The probability of dropping an element between them.
        training: Whether to drop.
    """
    hidden = weights[1].shape[1]
    state = tokens.new_zeros(2 * layers, 1, hidden)
    return torch.lstm(tokens[None], (state, state), weights, True, layers, dropout, training, True, True)[0][0]
