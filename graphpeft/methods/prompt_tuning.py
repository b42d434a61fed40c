"""Prompt tuning: virtual tokens in front of the input, learned as they are.

Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691; the same
numbers as PEFT's ``tuners/prompt_tuning/model.py``.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.methods.prompts.encoders import Encoder, Table
from graphpeft.methods.prompts.prompt_config import PromptLearningConfig
from graphpeft.rules.options import Editable
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register


class PromptTuningInit(str, enum.Enum):
    """The ways to initialise the virtual tokens of `PromptTuningConfig`.

    Examples:
        >>> PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init=PromptTuningInit.RANDOM).prompt_tuning_init
        <PromptTuningInit.RANDOM: 'RANDOM'>
    """

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@register
@dataclass(kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning's options; the names, defaults and meanings are PEFT's.

    Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.

    Attributes:
        prompt_tuning_init: ``"RANDOM"``: as ``nn.Embedding``. ``"SAMPLE_VOCAB"``: the embeddings of tokens drawn from
            the vocabulary. ``"TEXT"``: the embeddings of a text.
        prompt_tuning_init_text: That text; its tokens are repeated, or cut, to the number of virtual tokens.
        tokenizer_name_or_path: The tokenizer for it.
        tokenizer_kwargs: Options of ``AutoTokenizer.from_pretrained``.

    Raises:
        ValueError: For a value that an option can't have, and for options that are lacking or have no effect.

    Examples:
        >>> config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    """

    peft_type: ClassVar[PeftType] = PeftType.PROMPT_TUNING

    prompt_tuning_init: Literal["TEXT", "SAMPLE_VOCAB", "RANDOM"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: Editable[str | None] = None
    tokenizer_kwargs: Editable[dict[str, Any] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if self.prompt_tuning_init == "TEXT" and not getattr(self, name):
                raise ValueError(f"prompt_tuning_init='TEXT' needs {name}")
        if self.tokenizer_kwargs and self.prompt_tuning_init != "TEXT":
            raise ValueError("tokenizer_kwargs has no effect unless prompt_tuning_init is 'TEXT'")

    def check(self) -> None:
        """Raises ValueError for options that can't be."""
        super().check()
        if self.prompt_scope is not None and self.prompt_tuning_init != "RANDOM":
            raise ValueError(
                f"prompt_tuning_init={self.prompt_tuning_init!r} takes embeddings of tokens, and a scope has none; use "
                "'RANDOM'"
            )

    def encoder(self) -> Encoder:
        """Returns the table of virtual tokens."""
        return TokenTable(self.prompt_tuning_init)


@dataclass(frozen=True)
class TokenTable(Table):
    """Virtual tokens that can begin as the embeddings of real ones.

    Attributes:
        begins: ``"RANDOM"``, ``"SAMPLE_VOCAB"`` or ``"TEXT"``, as in the config.
    """

    begins: str = "RANDOM"

    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Draws the table, and puts real tokens into it."""
        super().initialise(parameters, config, embedding)
        if self.begins != "RANDOM":
            ids = _first_tokens(config, embedding)
            weight: Any = embedding.weight
            with torch.no_grad():
                parameters["prompt_embeddings"].copy_(embedding(ids.to(weight.device)))


def _first_tokens(config: Any, embedding: Any) -> Tensor:
    """Returns the ids, (tokens,), of the tokens with which the prompt begins."""
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return torch.randint(0, embedding.num_embeddings, (config.total_tokens,))
    from transformers import AutoTokenizer

    # an adapter's file must not decide that code from elsewhere runs
    options = {name: value for name, value in (config.tokenizer_kwargs or {}).items() if name != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    return torch.tensor(list(itertools.islice(itertools.cycle(ids), config.total_tokens)))
