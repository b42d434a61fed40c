"""The losses of what Shadow's small model predicts by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CLASSIFIERS = ("score", "classifier")


def classifier_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Returns copies of the weight and the bias of a model's classifier, by their names; none without a classifier."""
    found = next((model._modules[name] for name in _CLASSIFIERS if model._modules.get(name) is not None), None)
    if found is None:
        return {}
    if not isinstance(found, nn.Linear):
        raise ValueError(
            f"the classifier of {type(model).__name__} is a {type(found).__name__}, and Shadow's small model gets a "
            "copy of a linear layer alone; leave task_type out, without a loss of the small model's own"
        )
    return {name: parameter.detach().clone() for name, parameter in found.named_parameters()}


def at_last_token(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the hidden states at the last token of each row, (rows, features).

    Args:
        hidden: The hidden states, (rows, positions, features).
        mask: Which tokens are none of padding, (rows, positions); None for all.
    """
    if mask is None:
        return hidden[:, -1]
    places = torch.arange(mask.shape[-1], device=mask.device)
    last = ((mask != 0) * places).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def loss_of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of predicting each token from those before it.

    Args:
        logits: (rows, positions, vocabulary).
        labels: (rows, positions); −100 where none is to be predicted.
    """
    return F.cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten(), ignore_index=-100)


def loss_of_sequences(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of a label for each row, as the dtype and the number of labels tell its kind.

    Args:
        logits: (rows, labels).
        labels: A number for each row if there is one label, a class for each, or a probability for each of the labels.
    """
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).flatten())
    if not labels.is_floating_point():
        return F.cross_entropy(logits, labels.flatten().long())
    return F.binary_cross_entropy_with_logits(logits, labels)
