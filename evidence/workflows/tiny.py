"""Tiny models and data for workflows."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

LETTERS = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])}

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"vocab_size": len(LETTERS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}


def tokenizer() -> Any:
    """Returns one that has a token for each letter."""
    letters: Any = Tokenizer(models.WordLevel(LETTERS, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, padding_side="left", **named)


def llama(cls: Any = transformers.LlamaForCausalLM, **options: Any) -> Any:
    """Returns a model of two layers, the same at each call, with a token for each of `LETTERS`."""
    torch.manual_seed(0)
    return cls(transformers.LlamaConfig(**SIZES | options))


def mixtral() -> Any:
    """Returns a model with experts, whose weights are stacked."""
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    )


def t5() -> Any:
    """Returns an encoder with a decoder."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(LETTERS)}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def llava() -> Any:
    """Returns a model of images and text; four of its token 29 stand for an image of 8 by 8."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**size, image_size=8, patch_size=4)
    text = transformers.LlamaConfig(**SIZES)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=29)
    )
