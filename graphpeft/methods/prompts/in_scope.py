"""Puts virtual tokens into one module of any model: into its token sequence, and out of its output.

    y = module([prompt; x])[:, tokens:]                 x of shape (batch, length, dim)

The rest of the model never sees them. With one scope around all layers they go through the layers once (shallow
prompts); with a scope for each layer each has fresh ones (deep prompts). Source: Jia et al., "Visual Prompt Tuning",
arXiv 2203.12119.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphpeft._torch import pytree
from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompts.placement import Placement
from graphpeft.methods.prompts.scope_masks import CAUSAL, causal_with_tokens, mask_with_tokens
from graphpeft.wording import number_of

_OF_OTHERS = ("memory_", "encoder_", "cross_")
"""The prefixes of the names of masks of other sequences."""


@dataclass(frozen=True)
class InScope(Placement):
    """Into a module's token sequence, and out of its output.

    Attributes:
        tokens: The number of virtual tokens.
        position: Whether they stand ``"before"`` or ``"after"`` the module's own tokens.
        sequence: The name of the argument that is the sequence.
    """

    tokens: int
    position: str
    sequence: str

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Puts the virtual tokens into the sequence, and lengthens its masks."""
        sequence = inputs[self.sequence]
        masks = {
            name: mask_with_tokens(mask, name, sequence, self.tokens, self.position)
            for name, mask in inputs.items()
            if "mask" in name and not name.startswith(_OF_OTHERS)
        }
        caches = [value for name, value in inputs.items() if "cache" in name or "past" in name or name == "kwargs"]
        changed = {self.sequence: inserted(prompt, sequence, self.position, *caches), **masks}
        if CAUSAL in inputs:
            changed[CAUSAL] = causal_with_tokens(inputs[CAUSAL], self.position, *masks.values())
        return changed

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Takes the virtual tokens out."""
        others = [value for name, value in inputs.items() if name != self.sequence]
        return taken_out(output, inputs[self.sequence], self.tokens, self.position, *others)


# nodes


@recorded
def inserted(prompt: Tensor, sequence: Tensor, position: str, *caches: Any) -> Tensor:
    """Puts virtual tokens, (tokens, dim), before or after each sequence, (batch, length, dim)."""
    if any(map(_is_cache, caches)):
        raise ValueError(
            "a module with a prompt in its scope is given a cache, which would keep the virtual tokens; pass "
            "use_cache=False"
        )
    if not isinstance(sequence, Tensor):
        raise ValueError(f"a module with a prompt is given a {type(sequence).__name__}, which is no token sequence")
    if sequence.is_nested:
        raise ValueError(
            "a module with a prompt is given a nested tensor; build nn.TransformerEncoder with "
            "enable_nested_tensor=False"
        )
    if sequence.ndim != 3 or sequence.shape[-1] != prompt.shape[-1]:
        raise ValueError(
            f"a prompt of {number_of(prompt.shape[0], 'token')} of size {prompt.shape[1]} can't go into an input of "
            f"shape {tuple(sequence.shape)}, which is no token sequence (batch, tokens, {prompt.shape[1]})"
        )
    batch = prompt.to(sequence.dtype).expand(sequence.shape[0], -1, -1)
    return torch.cat((batch, sequence) if position == "before" else (sequence, batch), dim=1)


def _is_cache(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_cache, value.values()))
    # a flag, such as use_cache, is none
    return hasattr(value, "get_seq_length") or (isinstance(value, tuple | list) and len(value) > 0)


@recorded
def taken_out(output: Any, sequence: Tensor, tokens: int, position: str, *others: Any) -> Any:
    """Takes the virtual tokens out of a module's output: a sequence, or a container that begins with one.

    Other sequences of as many tokens in the container lose them, too, but for those among `others`, the module's other
    arguments.
    """
    leaves, structure = pytree.tree_flatten(output)
    batch, length = sequence.shape[:2]
    prompted = (batch, length + tokens)
    if not leaves or not _is_sequence(leaves[0], prompted):
        first = leaves[0] if leaves else None
        what = f"of shape {tuple(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise ValueError(
            f"a module with a prompt returned {what}, where the prompt can't be found; it must return a sequence of "
            f"{length} + {tokens} tokens"
        )
    kept = slice(tokens, None) if position == "before" else slice(length)
    given = {id(other) for other in others}
    return structure.unflatten(
        [leaf[:, kept] if _is_sequence(leaf, prompted) and id(leaf) not in given else leaf for leaf in leaves]
    )


def _is_sequence(value: Any, shape: tuple[int, int]) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == shape
