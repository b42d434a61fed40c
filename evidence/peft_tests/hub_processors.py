"""Tokenizers and processors of the tiny models: small, and trained on a few sentences."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import CLIPImageProcessor, ConvNextImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

SENTENCES = [
    "Classify if the tweet is a complaint or not.",
    "The quick brown fox jumps over the lazy dog, and the answer of the model is positive or negative.",
    "USER: What are these? ASSISTANT: I am so clever that sometimes I do not understand a word of what I am saying.",
]


def tokenizer(config: Any, more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of bytes and a few words, with the special tokens where a model's config has them."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *more]
    made = Tokenizer(tokenizer_models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[attr-defined]
    made.decoder = decoders.ByteLevel()  # type: ignore[attr-defined]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=getattr(config, "max_position_embeddings", 512),
    )


def image_processor() -> ConvNextImageProcessor:
    """Returns the processor of small pictures for a ResNet."""
    return ConvNextImageProcessor(size={"shortest_edge": 64})


def llava_processor(config: Any) -> LlavaProcessor:
    """Returns the processor of pictures and text for a Llava."""
    size = config.vision_config.image_size
    pictures = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    words = tokenizer(config.text_config, ("<image>",))
    return LlavaProcessor(
        pictures,
        words,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
