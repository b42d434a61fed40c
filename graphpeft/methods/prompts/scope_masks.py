"""The masks of a module's token sequence, with virtual tokens that every token sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphpeft.graph.recorded import recorded

CAUSAL = "is_causal"
"""The argument, or attribute, by which attentions are told that no token sees those after it."""


@recorded
def causal_with_tokens(is_causal: bool | None, position: str, *masks: Tensor | None) -> bool | None:
    """Returns whether an attention is causal: a lengthened mask tells it, and the hint is no longer true."""
    if any(mask is not None for mask in masks):
        return None if is_causal is None else False
    if is_causal and position == "after":
        raise ValueError("no token of a causal module sees a prompt after it; put the prompt before")
    return is_causal


_LEAVE_OUT = {
    "src_mask": True,
    "tgt_mask": True,
    "src_key_padding_mask": False,
    "tgt_key_padding_mask": False,
    "key_padding_mask": False,
}
"""Masks of PyTorch's layers whose True leaves a token out, and whose numbers are added; whether they are by pairs."""

_KEEP = "attention_mask"
"""The mask of Transformers models, whose True keeps a token."""


@recorded
def mask_with_tokens(mask: Tensor | None, name: str, sequence: Tensor, tokens: int, position: str) -> Tensor | None:
    """Lengthens a mask so that every token sees the virtual ones.

    Args:
        mask: None, or a mask by token, (batch, length), or by pairs of tokens, (…, length, length).
        name: The argument's name; PyTorch's names tell the meaning of the values.
        sequence: The sequence without virtual tokens.
        tokens: The number of virtual tokens.
        position: Where they stand.
    """
    if not isinstance(mask, Tensor):
        return mask
    around = (tokens, 0) if position == "before" else (0, tokens)
    length = sequence.shape[1]
    # as many sequences as tokens are no reason to take the one for the other
    if mask.shape == sequence.shape[:2] and not _LEAVE_OUT.get(name, False):
        return F.pad(mask, around, value=_visible(mask, name, is_by_pair=False))
    if mask.shape[-2:] == (length, length):
        return F.pad(mask, around * 2, value=_visible(mask, name, is_by_pair=True))
    raise ValueError(
        f"{name} has shape {tuple(mask.shape)}; a prompt can only lengthen masks of shape (batch, {length}) or "
        f"(…, {length}, {length})"
    )


def _visible(mask: Tensor, name: str, is_by_pair: bool) -> int:
    """Returns the value by which a mask lets a token be seen."""
    if name in _LEAVE_OUT or (mask.is_floating_point() and is_by_pair):
        return 0
    means_either = mask.dtype == torch.bool or "pad" in name
    if mask.is_floating_point() or (means_either and name != _KEEP):
        raise ValueError(
            f"{name} is of {mask.dtype}, and what its values mean for the virtual tokens isn't known; pass an integer "
            "mask, where 1 keeps a token, or a float mask by pairs of tokens, which is added"
        )
    return 1
