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
from graphpeft.methods.shadow.losses import at_last_token, classifier_of, loss_of_sequences, loss_of_tokens
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
