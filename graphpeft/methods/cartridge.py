"""Cartridges: the keys and values of a text, kept in place of the text and trained.

    cache[layer] = (P[2 · layer], P[2 · layer + 1])        P = [F; T]: F is fixed, T is trained

P is drawn, or begins as what the model itself keeps for the first tokens of a text. Cartridges of several texts are
composed by putting one behind the other. Source: Eyuboglu et al., "Cartridges: Lightweight and general-purpose long
context representations via self-study", arXiv 2506.06266; the same numbers as PEFT's ``tuners/cartridge``.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft.files.atomic_files import Staging
from graphpeft.files.foreign_files import CheckpointError
from graphpeft.files.hub import WEIGHTS_NAME
from graphpeft.methods.prompts.encoders import EMBEDDINGS_KEY, ENCODER_PREFIX, Encoder
from graphpeft.methods.prompts.prefix_config import PrefixConfig
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.options import SizeOrZero
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.stacks import peft_files
from graphpeft.wording import joined

_FROZEN, _TRAINED = f"{ENCODER_PREFIX}frozen_embedding", f"{ENCODER_PREFIX}trainable_embedding"


@register
@dataclass(kw_only=True)
class CartridgeConfig(PrefixConfig):
    """The options of cartridges; the names, defaults and meanings are PEFT's.

    `initialize_kv_prefix_from_text` gives a cartridge its first values, and `compose_cartridge_adapters` makes one of
    several.

    Source: Eyuboglu et al., "Cartridges: Lightweight and general-purpose long context representations via self-study",
    arXiv 2506.06266.

    Attributes:
        num_frozen_tokens: How many of the virtual tokens, the first ones, aren't trained.

    Raises:
        ValueError: For a value that an option can't have, and for more frozen tokens than there are tokens.

    Examples:
        >>> config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
        >>> config.num_frozen_tokens
        1
    """

    peft_type: ClassVar[PeftType] = PeftType.CARTRIDGE

    num_frozen_tokens: SizeOrZero = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_more_frozen()

    def check(self) -> None:
        """Raises ValueError for options that can't be."""
        super().check()
        self._refuse_more_frozen()

    def _refuse_more_frozen(self) -> None:
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ValueError(
                f"num_frozen_tokens={self.num_frozen_tokens} is more than num_virtual_tokens={self.num_virtual_tokens}"
            )

    @property
    def holds_table(self) -> bool:
        """Whether the adapter has all tokens in one tensor, which it never has: only some are trained."""
        return False

    def encoder(self) -> Encoder:
        """Returns the encoder, which puts the tokens together."""
        return Cartridge()

    def packed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of a file: of the tokens, all in one.

        Args:
            tensors: The adapter's tensors, by their names in the file.
        """
        return {key: tensor for key, tensor in tensors.items() if not key.startswith(ENCODER_PREFIX)}

    def unpacked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the adapter's tensors: those tokens apart that aren't trained.

        Args:
            tensors: The tensors of a file, by their names.

        Raises:
            ValueError: If the file has another number of tokens.
        """
        found = dict(tensors)
        tokens = found.pop(EMBEDDINGS_KEY, None)
        if tokens is None:
            return found
        if tokens.ndim != 2 or len(tokens) != self.num_virtual_tokens:
            shape = tuple(tokens.shape)
            raise ValueError(
                f"{EMBEDDINGS_KEY} has the shape {shape}, and num_virtual_tokens={self.num_virtual_tokens} of the "
                "config is the number of its rows"
            )
        parts = {_FROZEN: tokens[: self.num_frozen_tokens], _TRAINED: tokens[self.num_frozen_tokens :]}
        return found | {key: part for key, part in parts.items() if len(part)}


@dataclass(frozen=True)
class Cartridge(Encoder):
    """Keys and values that are parameters, of which the first tokens' aren't trained."""

    def parameters(self, config: Any) -> dict[str, ParameterSpec]:
        """Returns the tokens that aren't trained, and those that are; a part without tokens is left out."""
        frozen = config.num_frozen_tokens
        specs = {
            "prompt_frozen": ParameterSpec(
                (frozen, config.width), _FROZEN, is_trained=False, is_counted=True, path="frozen_embedding"
            ),
            "prompt_trained": ParameterSpec(
                (config.num_virtual_tokens - frozen, config.width), _TRAINED, path="trainable_embedding"
            ),
        }
        return {name: spec for name, spec in specs.items() if spec.shape[0]}

    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Draws the tokens as ``nn.Embedding`` does."""
        for tokens in parameters.values():
            nn.init.normal_(tokens)

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the keys and values, (tokens, 2 · layers · heads · head size)."""
        return torch.cat(list(parameters.values()))


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Writes one cartridge made of several: their tokens, one behind the other.

    As many of the first tokens as in the first cartridge aren't trained.

    Args:
        adapter_paths: The folders of the cartridges.
        output_path: The folder to write into, which is made if it isn't there.
        safe_serialization: Whether the file is ``adapter_model.safetensors``; else it is a pickle.

    Raises:
        CheckpointError: If a file is damaged, or isn't that of its config.
        FileNotFoundError: If a file is missing.
        ValueError: If there are fewer than two, one is no cartridge or trains more than its tokens, or they are for
            models of different sizes; or if the folder has another file, which readers would prefer. Nothing is written
            then.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> for folder, tokens in (("first", 3), ("second", 5)):
        ...     base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50))
        ...     config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
        ...     get_peft_model(base, config).save_pretrained(folder)
        >>> compose_cartridge_adapters(["first", "second"], output_path="both")
        >>> CartridgeConfig.from_pretrained("both").num_virtual_tokens
        8
    """
    if len(adapter_paths) < 2:
        raise ValueError("there is nothing to compose; give the folders of two cartridges or more")
    found = [peft_files.read(path) for path in adapter_paths]
    for path, saved in zip(adapter_paths, found, strict=True):
        _refuse_other(path, saved)
    config: Any = copy.copy(found[0].config)
    for name in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
        values = [getattr(saved.config, name) for saved in found]
        if any(value != values[0] for value in values):
            raise ValueError(f"the cartridges have different values of {name}: {joined(list(map(str, values)))}")
    bases = dict.fromkeys(saved.config.base_model_name_or_path for saved in found)
    if len(bases) > 1:
        warnings.warn(
            f"the cartridges are of different base models: {joined(list(map(str, bases)))}; one whose keys come from "
            "another model means nothing",
            PeftWarning,
            stacklevel=2,
        )
    tokens = torch.cat([saved.tensors[EMBEDDINGS_KEY] for saved in found])
    config.num_virtual_tokens = len(tokens)
    config.check()
    if not safe_serialization and Path(output_path, WEIGHTS_NAME).exists():
        raise ValueError(f"{output_path} has {WEIGHTS_NAME}, which readers prefer to a pickle; remove it")
    with Staging(Path(output_path)) as staging:
        peft_files.write(staging.folder, config, {EMBEDDINGS_KEY: tokens}, safe_serialization)
        staging.put()


def _refuse_other(path: str | os.PathLike[str], saved: peft_files.SavedAdapter) -> None:
    """Raises an error unless a saved adapter is a cartridge, and nothing else."""
    saved.refuse_two_saves(path)
    config: Any = saved.config
    if not isinstance(config, CartridgeConfig):
        raise ValueError(f"{path} holds a {config.method} adapter, and no cartridge")
    others = [key for key in saved.tensors if key != EMBEDDINGS_KEY]
    if others:
        raise ValueError(f"{path} holds {joined(others)}, too, of which there can be one only; it can't be composed")
    tokens = saved.tensors.get(EMBEDDINGS_KEY)
    if tokens is None or tuple(tokens.shape) != (config.num_virtual_tokens, config.width):
        shape = None if tokens is None else tuple(tokens.shape)
        raise CheckpointError(
            f"{path}: {EMBEDDINGS_KEY} is of shape {shape}, and its config says {config.num_virtual_tokens} tokens of "
            f"{config.width} values"
        )
