"""Shadow's small model in an adapter: its parameters, the state that it gives a call, and the loss of that."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.methods.prompts.caches import CACHES, has_tokens
from graphpeft.methods.shadow.mirror import Mirror, config_of_mirror, size_in
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.present_call import PresentCall

_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_BACKBONE, _PROJECTION, _HEAD = "shadow_backbone", "shadow_projection", "shadow_head"


@dataclass(frozen=True, eq=False)
class SmallModel:
    """The small model of one adapter.

    Attributes:
        mirror: Its module, without values.
        width: The size of the large model's hidden states.
        layers: The number of the large model's layers.
        dtype: The dtype of its parameters.
        is_fed: Whether it is given the large model's embeddings.
        classifier: First values of a classifier of its own, by name; none if it predicts tokens, or nothing.
        key: The key that tells its states from those of another adapter.
    """

    mirror: Mirror
    width: int
    layers: int
    dtype: torch.dtype
    is_fed: bool
    classifier: Mapping[str, Tensor]
    key: int = field(default_factory=lambda: uuid.uuid4().int >> 80)

    @property
    def parameters(self) -> dict[str, ParameterSpec]:
        """Its parameters, with those of the projection of its hidden states, if they have another size."""
        found = {_local(name): (f"{_BACKBONE}.default.{name}", shape) for name, shape in self.mirror.shapes.items()}
        unread = {_local(name) for name in self.mirror.unread}
        if self.mirror.size != self.width:
            found[_PROJECTION] = (f"{_PROJECTION}.default.weight", (self.width, self.mirror.size))
        for name, value in self.classifier.items():
            found[f"{_HEAD}_{name}"] = (f"{_HEAD}.default.{name}", tuple(value.shape))
        return {
            local: ParameterSpec(
                shape,
                key,
                scope=key,
                written_once=True,
                dtype=self.dtype,
                is_trained=local not in unread,
                is_counted=True,
            )
            for local, (key, shape) in found.items()
        }

    def draw(self, parameters: Mapping[str, Tensor]) -> None:
        """Draws the first values of its parameters."""
        for name, drawn in self.mirror.drawn().named_parameters():
            parameters[_local(name)].copy_(drawn)
        if _PROJECTION in parameters:
            parameters[_PROJECTION].copy_(nn.Linear(self.mirror.size, self.width, bias=False).weight)
        for name, value in self.classifier.items():
            parameters[f"{_HEAD}_{name}"].copy_(value)

    def state(self, call: PresentCall, own: Mapping[str, Tensor]) -> Tensor:
        """Returns what it makes of the tokens of a call, (rows, positions, features of the large model)."""
        given = call.arguments
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        kept = first_layer_in(cache, self.key, self.layers, self.mirror.config)
        inputs = {name: given[name] for name in _INPUTS if given.get(name) is not None}
        if not {"input_ids", "inputs_embeds"} & inputs.keys():
            raise ValueError("Shadow's small model reads input_ids or inputs_embeds; pass one of them")
        if self.is_fed and "inputs_embeds" not in inputs:
            inputs["inputs_embeds"] = call.model.get_input_embeddings()(inputs["input_ids"])
        if "inputs_embeds" in inputs:
            inputs.pop("input_ids", None)
        values = {name: own[_local(name)] for name in self.mirror.shapes}
        mirror: Any = self.mirror
        hidden = mirror.run(values, call.is_training, inputs, cache, kept)
        return F.linear(hidden, own[_PROJECTION]) if _PROJECTION in own else hidden

    def loss(self, call: PresentCall, own: Mapping[str, Tensor], state: Tensor, predicts_tokens: bool) -> Tensor | None:
        """Returns the loss of its own prediction of the labels of a call; None if it predicts nothing."""
        labels = call.arguments["labels"]
        if predicts_tokens:
            head = call.model.get_output_embeddings()
            return None if head is None else loss_of_tokens(head(state), labels)
        if not self.classifier:
            return None
        pooled = at_last_token(state, call.arguments.get("attention_mask"))
        return loss_of_sequences(F.linear(pooled, *(own[f"{_HEAD}_{name}"] for name in self.classifier)), labels)


def small_model_for(
    model: Any, around: Any, layers: int, sizes: Mapping[str, int | None], shares_embeddings: bool, classifies: bool
) -> SmallModel:
    """Returns the small model for a large one."""
    config, width = config_of_mirror(around.config, sizes), size_in(model.config)
    is_fed = shares_embeddings and size_in(config) == width
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    classifier = classifier_of(model) if classifies else {}
    return SmallModel(Mirror(around, config, dtype, is_fed), width, layers, dtype, is_fed, classifier)


def _local(name: str) -> str:
    return f"{_BACKBONE}_{name.replace('.', '__')}"


_FIRST = "_graphpeft_shadow_layers"


def first_layer_in(cache: Any, key: int, layers: int, config: Any) -> int | None:
    """Returns the number of the first of the small model's layers in a cache; an empty cache gets these."""
    if has_tokens(cache):
        return _known(cache, key)
    # others have a size, or a device, for each layer that there was when they were made
    if cache is None or type(cache).__name__ != "DynamicCache" or cache.offloading:
        return None
    from transformers import DynamicCache

    while cache.layer_class_to_replicate is not None and len(cache.layers) < layers:
        cache.layers.append(cache.layer_class_to_replicate())
    vars(cache).setdefault(_FIRST, {})[key] = first = len(cache.layers)
    cache.layers += DynamicCache(config=config).layers
    return first


def _known(cache: Any, key: int) -> int:
    first = getattr(cache, _FIRST, {}).get(key)
    if first is None or cache.get_seq_length(first) != cache.get_seq_length():
        raise ValueError(
            "Shadow's small model needs all tokens, and this call goes on from those in a cache that it hasn't seen; "
            "give an empty DynamicCache to the first call, as generate does, or pass the whole sequence and "
            "use_cache=False"
        )
    return first


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
