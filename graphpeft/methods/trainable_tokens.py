"""Trainable tokens: trains a few rows of an embedding, and leaves the rest of its table alone.

    W'[token_indices] = rows        W'[others] = W[others]

The rows replace rows of the table. A module that is tied to the table, such as the head of a language model, has the
same rows.

Source: PEFT's ``tuners/trainable_tokens/layer.py``, since there is no paper. The numbers are the same, but at a linear
layer with a bias, which PEFT drops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from graphpeft.rules.options import InitWeights
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.report import Report
from graphpeft.rules.trained import TableRows
from graphpeft.targeting.embedding_layers import input_embedding
from graphpeft.targeting.target_config import TargetedConfig

_ROWS = "trainable_tokens_delta"


@register
@dataclass(kw_only=True)
class TrainableTokensConfig(TargetedConfig):
    """The options of trainable tokens; the names, defaults and meanings are PEFT's.

    The modules that `target_modules` names are embeddings or linear layers, with a row for each token. None takes the
    model's input embedding, which its `get_input_embeddings` tells, or else what is called ``embed_tokens``.

    Attributes:
        token_indices: The indices of the tokens, which are those of rows of the weight.
        init_weights: Whether the rows are those of the weight at first; if False, they are drawn from a normal
            distribution.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
        >>> model = get_peft_model(model, TrainableTokensConfig(target_modules=["0"], token_indices=[7, 8]))
        >>> {name: tuple(rows.shape) for name, rows in get_peft_model_state_dict(model).items()}
        {'base_model.model.0.trainable_tokens_delta': (2, 4)}
    """

    peft_type: ClassVar[PeftType] = PeftType.TRAINABLE_TOKENS
    prefix: ClassVar[str | None] = "trainable_tokens_"
    lacks: ClassVar[frozenset[str]] = frozenset(
        {"exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"}
    )

    token_indices: list[int] = field(default_factory=list)
    init_weights: InitWeights = True

    def targets_by_default(self, model: nn.Module) -> str:
        """Returns the path of the model's input embedding.

        Args:
            model: The model.
        """
        return input_embedding(dict(model.named_modules())) or "embed_tokens"

    def find_sites(self, finder: Any, report: Report) -> list[Any]:
        """Returns no sites: rows are trained as they are."""
        return []

    def find_rows(self, modules: Mapping[str, nn.Module], report: Report) -> dict[str, TableRows]:
        """Returns the rows of the modules that the config names."""
        rows = TableRows(tuple(self.token_indices), _ROWS, "token_indices", written_for_tied=True)
        return dict.fromkeys(self.targeted_modules(modules, report), rows)

    def ignores(self, key: str) -> bool:
        """Returns whether a file may hold a tensor that the adapter doesn't need.

        Args:
            key: The tensor's name in the file.
        """
        # of a second adapter, PEFT wraps what is tied again, and writes its rows once more
        return key.endswith(f".base_layer.{_ROWS}")

    def initialise_rows(self, rows: Tensor) -> None:
        """Draws the rows if the config asks for it."""
        if not self.init_weights:
            nn.init.normal_(rows)
