"""Activated LoRA (aLoRA): LoRA that acts from a row's invocation tokens on, and leaves what is before as it is.

    y'ₜ = yₜ + s · (dropout(xₜ) Aᵀ Bᵀ + c) for t ≥ T − offset, else yₜ            T: the number of positions

The offset of a row is how far before its end its last invocation begins, and 0 where there is none. So the keys and
values of a context are the base's, and adapters can share them. A model that generates looks for the tokens in the
prompt. Source: Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics", arXiv 2504.12397; the same numbers
as PEFT's ``ALoraLinearVariant`` in ``tuners/lora/variants.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import as_node
from graphpeft.graph.scaled_sum import add_scaled, is_captured
from graphpeft.methods.lora.linear import LoraLeaf, LoraLinear
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import OperationRule
from graphpeft.wording import number_of


@dataclass(frozen=True)
class Activated(OperationRule):
    """The branch beside a linear layer, or beside the call of a quantised one, at some positions of each row.

    Attributes:
        lora: LoRA's rule for the same site.
        tokens: The invocation tokens.
    """

    call_inputs: ClassVar[tuple[str, ...]] = ("alora_offsets",)
    call_inputs_by_row: ClassVar[bool] = True
    scales: ClassVar[tuple[str, ...]] = ("lora_scaling",)

    lora: LoraLinear | LoraLeaf
    tokens: tuple[int, ...]

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses the same as LoRA."""
        return self.lora.check(site, config)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, and the bias of B if there is one."""
        return self.lora.parameters(site, config)

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns the constants of LoRA."""
        return self.lora.constants(site, config)

    def replaces(self, site: Any, config: Any) -> bool:
        """Returns whether the initialisation replaces the weight."""
        return self.lora.replaces(site, config)

    def initialise(
        self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, Tensor] | None:
        """Gives A and B the values that LoRA gives them."""
        return self.lora.initialise(parameters, site, config, module)

    def rewrite(
        self,
        x: Any,
        y: Any,
        operation: Any,
        alora_offsets: Any,
        lora_A: Any,
        lora_B: Any,
        *,
        lora_bias: Any = None,
        lora_scaling: Any,
        lora_dropout: Any = None,
        training: Any,
    ) -> Any:
        """Adds the branch to the operation's value where it acts."""
        before = as_node(positions_before, x, alora_offsets, self.tokens)
        h = x.to(lora_A.dtype) if self.lora.casts else x
        if self.lora.drops:
            h = as_node(dropped_behind, h, before, lora_dropout, training)
        branch = self.lora.branch(h, operation, lora_A, lora_B, lora_bias)
        result = add_scaled(y, branch.masked_fill(before, 0), lora_scaling)
        return result.to(y.dtype) if self.lora.casts else result

    def unmergeable(self, site: Any) -> str:
        """Returns that no weight does what it does."""
        return "aLoRA acts at some positions of a row alone, so that no one weight does what it does"


def positions_before(x: Tensor, offsets: Any, tokens: tuple[int, ...]) -> Tensor:
    """Returns where an adapter doesn't act yet, of shape (rows, positions, 1), or (rows, 1) without positions.

    Args:
        x: The input of the adapted layer, (rows, positions, features) or (rows, features).
        offsets: How far before the end each row's invocation begins, as a tensor or a list, with 0 or None for none; or
            a mapping with such for each adapter's tokens.
        tokens: The adapter's.
    """
    if isinstance(offsets, Mapping):
        if tokens not in offsets:
            raise TypeError(f"an active adapter needs {list(tokens)} in input_ids, or alora_offsets, in each call")
        offsets = offsets[tokens]
    if not isinstance(offsets, Tensor):
        offsets = torch.tensor([offset or 0 for offset in offsets], device=x.device)
    positions = x.shape[1] if x.ndim == 3 else 1
    if x.ndim not in (2, 3) or x.shape[0] != offsets.shape[0]:
        raise ValueError(
            f"alora_offsets has {number_of(offsets.shape[0], 'row')}, and an adapted layer is given a tensor of the "
            f"shape {tuple(x.shape)}: aLoRA is for layers that are given (rows, positions, features); name others in "
            "target_modules"
        )
    begins = positions - offsets.to(x.device).clamp(0, positions)
    return (torch.arange(positions, device=x.device) < begins[:, None]).view(*x.shape[:-1], 1)


def dropped_behind(h: Tensor, before: Tensor, probability: float, training: bool) -> Tensor:
    """Returns `h` with elements dropped where an adapter acts; as PEFT, it draws for these alone.

    Args:
        h: Of shape (rows, …, features).
        before: Where it doesn't act, (rows, …, 1).
        probability: The probability.
        training: Whether elements are dropped.
    """
    if not training or is_captured():
        return F.dropout(h, probability, training)
    acts = ~before.squeeze(-1)
    return h.masked_scatter(acts.unsqueeze(-1), F.dropout(h[acts], probability))


def offsets_in(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Returns how far before the end of each row its last invocation begins, (rows,), with 0 for none.

    Args:
        ids: The tokens of each row, (rows, length).
        tokens: The invocation.
    """
    starts = ids.shape[1] - len(tokens) + 1
    if starts <= 0:
        return ids.new_zeros(ids.shape[0])
    found = ids[:, :starts] == tokens[0]
    for place, token in enumerate(tokens[1:], start=1):
        found = found & (ids[:, place : place + starts] == token)
    # a later one begins less far before the end
    distances = torch.arange(ids.shape[1], len(tokens) - 1, -1, device=ids.device)
    least = torch.where(found, distances, ids.shape[1] + 1).amin(dim=1)
    return torch.where(least <= ids.shape[1], least, 0)


def offsets_of_call(tokens: tuple[int, ...], arguments: Mapping[str, Any], prompt: Tensor | None) -> Mapping[str, Any]:
    """Returns the offsets of a call as the value of `alora_offsets`; none if it is given no tokens."""
    ids = arguments.get("input_ids")
    if prompt is None:
        if ids is None:
            return {}
        offsets = offsets_in(ids, tokens)
        if not is_captured() and _length(arguments) and not bool(offsets.all()):
            warnings.warn(
                f"a call with a cache has no alora_invocation_tokens={list(tokens)} in each row of its "
                "input_ids, so the adapter doesn't act in such rows; pass alora_offsets, how far before the end of "
                "each row the invocation begins, if it is in what came before",
                PeftWarning,
                stacklevel=2,
            )
        return {"alora_offsets": {tokens: offsets}}
    given = ids if ids is not None else arguments.get("inputs_embeds")
    if given is None:
        return {}
    offsets = offsets_in(prompt, tokens)
    # the prompt may be given in pieces, and what is generated comes behind it
    length = _length(arguments)
    behind = max(given.shape[1] - prompt.shape[1], 0) if length is None else length + given.shape[1] - prompt.shape[1]
    offsets = torch.where(offsets > 0, (offsets + behind).clamp(min=0), 0)
    return {"alora_offsets": {tokens: offsets.repeat_interleave(given.shape[0] // prompt.shape[0])}}


def _length(arguments: Mapping[str, Any]) -> Any:
    """Returns of how many positions a call is given keys and values; None if it is given no cache that tells."""
    caches = (value for value in arguments.values() if hasattr(value, "get_seq_length"))
    return next((cache.get_seq_length() for cache in caches), None)
