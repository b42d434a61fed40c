"""A context in front of the input, with labels of its own, and the loss over the labels of both.

A token whose type is a positive multiple of 4 is a label. Earlier labels weigh less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompts.in_front import LABELS, Prepended
from graphpeft.methods.prompts.placement import Placement
from graphpeft.sites.site import CallSite

TYPES = "input_type_mask"
"""The argument with the types of the input's tokens, (batch, tokens)."""


@dataclass(frozen=True)
class PrependedContext(Placement):
    """In front of the input, with labels of their own, and with a loss over the labels of both.

    Attributes:
        prepended: Where the tokens go.
        ids: The tokens of the context.
        types: Their types.
        decay: By which factor each step back weighs less.
    """

    prepended: Prepended
    ids: tuple[int, ...]
    types: tuple[int, ...]
    decay: float

    @property
    def asks(self) -> tuple[str, ...]:
        """The types of the input's tokens, and the arguments for the place in front."""
        return (TYPES, *self.prepended.asks)

    def check(self, site: CallSite) -> str | None:
        """Returns the reason why the module can't take a prompt, or None."""
        if LABELS not in site.arguments:
            return "its forward takes no labels, over which a context is trained"
        return self.prepended.check(site)

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Puts the context in front, with its labels."""
        changed = self.prepended.enter(prompt, inputs, word_embeddings, config)
        changed[LABELS] = labels_with_context(inputs[LABELS], inputs[TYPES], self.ids, self.types)
        return changed

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Takes the loss over labels, weighed by their distance from the end."""
        return with_loss(output, entered[LABELS], inputs[TYPES], self.types, self.decay)


@recorded
def labels_with_context(
    labels: Tensor | None, input_types: Tensor | None, ids: tuple[int, ...], types: tuple[int, ...]
) -> Tensor | None:
    """Puts the context's tokens in front of the labels, (batch, tokens), and keeps those that are labels by type."""
    if labels is None:
        return None
    all_types = types_with_context(labels, input_types, types)
    context = labels.new_tensor(ids).expand(labels.shape[0], -1)
    is_label = (all_types > 0) & (all_types % 4 == 0)
    return torch.cat((context, labels), dim=1).masked_fill(~is_label, -100)


def types_with_context(labels: Tensor, input_types: Tensor | None, types: tuple[int, ...]) -> Tensor:
    """Returns the types of the context's tokens and of the input's, which are numbered on, (batch, tokens)."""
    given = torch.full_like(labels, 4) if input_types is None else input_types.to(labels.device)
    context = given.new_tensor(types).expand(labels.shape[0], -1)
    return torch.cat((context, torch.where(given > 0, given + max(types), given)), dim=1)


@recorded
def with_loss(
    output: Any, labels: Tensor | None, input_types: Tensor | None, types: tuple[int, ...], decay: float
) -> Any:
    """Returns a model's output with the mean loss of its labels, each label weighed by how far from the last it is.

    Args:
        output: The output, with `logits` of shape (batch, tokens, vocabulary).
        labels: The labels of the context and of the input, (batch, tokens), or None.
        input_types: The types of the input's tokens, or None.
        types: The types of the context's tokens.
        decay: The factor for each step back.
    """
    if labels is None:
        return output
    if isinstance(output, tuple):
        raise ValueError("a model with a context computes its own loss from the output's logits; pass return_dict=True")
    all_types = types_with_context(labels[:, len(types) :], input_types, types)[:, 1:]
    targets = labels[:, 1:]
    losses = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), targets, reduction="none")
    weights = torch.ones_like(losses)
    for row, kinds in zip(weights, all_types, strict=True):
        last_first = kinds[(kinds > 0) & (kinds % 4 == 0)].unique().flip(0)
        for steps, kind in enumerate(last_first):
            row[kinds == kind] = decay**steps
    output.loss = (losses * weights)[targets != -100].mean()
    return output
