"""Puts virtual tokens in front of the input of a Transformers model, as nodes at the boundary of its graph.

    inputs_embeds  = [prompt; embedding(input_ids)]
    attention_mask = [1 … 1; attention_mask]          labels = [-100 … -100; labels], where the outputs are tokens

Inputs that aren't given stay absent; `position_ids` are dropped, and the model counts the longer sequence itself. While
text is generated, the prompt goes in when the cache is empty; the attention mask is lengthened at each step. In a model
with an encoder and a decoder the prompt goes into the encoder, and the decoder gets a longer mask for the encoder's
output. The same numbers as PEFT's ``peft_model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompts.caches import absent, cache_of, has_tokens, under_one_name
from graphpeft.methods.prompts.lengthening import (
    checked_positions,
    exceeds_positions,
    lengthened,
    lengthened_at_first,
    lengthened_for,
    shifted,
)
from graphpeft.methods.prompts.placement import Placement
from graphpeft.sites.site import CallSite
from graphpeft.wording import number_of

LABELS, POSITIONS = "labels", ("start_positions", "end_positions")
"""The arguments that hold the answers: labels of tokens, and places of an answer in the text."""


@dataclass(frozen=True)
class Prepended(Placement):
    """In front of the tokens that a Transformers model reads.

    Attributes:
        tokens: The number of virtual tokens.
        follows: The names of arguments that are by token, and are moved behind the prompt: labels, and positions.
        positions: The number of positions in the model's table; None without a table.
        cache_names: The other name of its cache, if its forward takes one.
    """

    tokens: int
    follows: tuple[str, ...]
    positions: int | None
    cache_names: tuple[str, ...] = ()

    @property
    def asks(self) -> tuple[str, ...]:
        """The other name of the cache."""
        return self.cache_names

    def check(self, site: CallSite) -> str | None:
        """Returns the reason why the module can't take a prompt, or None."""
        if "inputs_embeds" not in site.arguments:
            return "its forward has no argument inputs_embeds"
        return exceeds_positions(self.tokens, self.positions)

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Puts the virtual tokens in front, and lengthens masks, types and labels."""
        past = cache_of(inputs)
        changed = under_one_name(past, inputs) if self.asks else {}
        embedded = embeddings_of(inputs["input_ids"], inputs["inputs_embeds"], word_embeddings)
        changed["input_ids"] = absent(inputs["input_ids"])
        changed["inputs_embeds"] = prepended(prompt, self.tokens, embedded, past, self.positions)
        if "attention_mask" in inputs:
            changed["attention_mask"] = lengthened_for(inputs["attention_mask"], self.tokens, embedded, past)
        if "token_type_ids" in inputs:
            changed["token_type_ids"] = lengthened_at_first(inputs["token_type_ids"], self.tokens, 0, past)
        if "position_ids" in inputs:
            changed["position_ids"] = absent(checked_positions(inputs["position_ids"], self.tokens, embedded, past))
        if LABELS in self.follows and LABELS in inputs:
            changed[LABELS] = lengthened_at_first(inputs[LABELS], self.tokens, -100, past)
        for name in POSITIONS:
            if name in self.follows and name in inputs:
                changed[name] = shifted(inputs[name], self.tokens)
        return changed


@dataclass(frozen=True)
class InEncoding(Placement):
    """In the output of an encoder, which has the virtual tokens: the decoder's mask for it gets longer.

    Attributes:
        tokens: The number of virtual tokens.
    """

    tokens: int

    def check(self, site: CallSite) -> str | None:
        """Returns the reason why the decoder can't read a longer encoding, or None."""
        has_mask = "encoder_attention_mask" in site.arguments
        return None if has_mask else "its forward has no argument encoder_attention_mask"

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Lengthens the mask for the encoder's tokens."""
        return {"encoder_attention_mask": lengthened(inputs["encoder_attention_mask"], self.tokens, 1)}


# nodes


@recorded
def embeddings_of(input_ids: Tensor | None, inputs_embeds: Tensor | None, word_embeddings: nn.Module) -> Tensor:
    """Returns the embeddings of the tokens, (batch, tokens, dim), from ids or as they were given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass either input_ids or inputs_embeds to a model with a prompt, and not both")
    return word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds


@recorded
def prepended(prompt: Tensor, tokens: int, embeddings: Tensor, cache: Any, positions: int | None) -> Tensor:
    """Puts the first virtual tokens in front of each sequence, unless the cache has them already.

    Args:
        prompt: The virtual tokens, (tokens, dim) or (batch, tokens, dim).
        tokens: The number of these tokens.
        embeddings: The sequences, (batch, length, dim).
        cache: The model's cache, or None.
        positions: The number of positions for which the model has a table, or None.
    """
    if has_tokens(cache):
        return embeddings
    if positions is not None and tokens + embeddings.shape[1] > positions:
        raise ValueError(
            f"{number_of(tokens, 'virtual token')} and {embeddings.shape[1]} of the input are more than the "
            f"{positions} positions that the model has a table for; shorten the input"
        )
    batch = prompt[..., :tokens, :].to(embeddings.dtype).expand(embeddings.shape[0], -1, -1)
    return torch.cat((batch, embeddings), dim=1)
