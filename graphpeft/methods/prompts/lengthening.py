"""Masks, labels and positions of a model's input, with virtual tokens in front.

Each is a node of a graph, and what isn't given stays None.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompts.caches import has_tokens, length_with
from graphpeft.wording import number_of


def exceeds_positions(tokens: int, positions: int | None) -> str | None:
    """Returns the reason why a prompt doesn't fit into a table of positions, or None; without a table it fits."""
    if positions is None or tokens < positions:
        return None
    return f"a prompt of {number_of(tokens, 'token')} leaves no room in its table of {number_of(positions, 'position')}"


@recorded
def lengthened(mask: Tensor | None, tokens: int, value: int) -> Tensor | None:
    """Puts `tokens` times `value` in front of each row of a mask, (batch, tokens)."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)}, and a prompt lengthens masks of (batch, tokens) only; "
            "a static cache makes other ones: leave cache_implementation out"
        )
    return F.pad(mask, (tokens, 0), value=value)


@recorded
def lengthened_for(mask: Tensor | None, tokens: int, embeddings: Tensor, cache: Any) -> Tensor | None:
    """Lengthens a mask of the tokens in the cache and of the input, (batch, length, …), by ones."""
    longer = lengthened(mask, tokens, 1)
    if longer is not None and longer.shape[1] != length_with(cache, embeddings, longer.shape[1]):
        raise ValueError(_cut(longer.shape[1], length_with(cache, embeddings, 0), "the attention mask"))
    return longer


@recorded
def checked_positions(position_ids: Tensor | None, tokens: int, embeddings: Tensor, cache: Any) -> Tensor | None:
    """Returns positions as they are, (batch, length)."""
    # the largest position is a tensor's value, which no compiled graph can ask for
    if position_ids is None or not has_tokens(cache) or torch.compiler.is_compiling():
        return position_ids
    most = int(position_ids.max()) + 1 + tokens
    if most > length_with(cache, embeddings, most):
        raise ValueError(_cut(most, length_with(cache, embeddings, most), "position_ids"))
    return position_ids


def _cut(told: int, there: int, by: str) -> str:
    return (
        f"there are {told} tokens by {by}, and {there} in the cache and the input, with those of the prompt: generate "
        "cuts off as many tokens as a cache has, of which some are virtual; call generate without a cache"
    )


@recorded
def lengthened_at_first(values: Tensor | None, tokens: int, value: int, cache: Any) -> Tensor | None:
    """Puts `tokens` times `value` in front of each row, (batch, tokens), if the prompt goes in now."""
    return values if values is None or has_tokens(cache) else F.pad(values, (tokens, 0), value=value)


@recorded
def shifted(positions: Tensor | None, tokens: int) -> Tensor | None:
    """Returns positions, moved behind the virtual tokens."""
    return None if positions is None else positions + tokens
