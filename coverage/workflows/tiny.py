"""Tiny models and data for workflows."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

LETTERS = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])}


def tokenizer() -> Any:
    """Returns one that has a token for each letter."""
    letters: Any = Tokenizer(models.WordLevel(LETTERS, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, padding_side="left", **named)


def llama(cls: Any = transformers.LlamaForCausalLM, **options: Any) -> Any:
    """Returns a model of two layers, the same at each call, with a token for each of `LETTERS`."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return cls(transformers.LlamaConfig(vocab_size=len(LETTERS), **size | options, **tokens))
