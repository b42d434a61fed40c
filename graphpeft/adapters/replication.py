"""Lets a Transformers model run some of its layers several times, each time with an adapter of their own.

`layer_replication=[(0, 4), (2, 5)]` makes of the layers 0 1 2 3 4 the layers 0 1 2 3 2 3 4, whose weights are the same
tensors; source: ``replicate_layers`` in PEFT's ``tuners/tuners_utils.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.rules.config import PeftConfig
from graphpeft.transaction import set_attribute

Pairs = Sequence[Sequence[int]]

_MOST_TIMES = 16
"""How many times as many layers there may be; models that were made deeper so have twice as many."""


@dataclass
class Replication:
    """The layers that were exchanged in a model.

    Attributes:
        pairs: From which layer on, and up to which, in turn.
        holder: The module that holds the layers.
        name: Their name in it.
        layers: The layers before.
        config: The model's config.
        options: Its options that speak of layers, as they were.
    """

    pairs: tuple[tuple[int, int], ...]
    holder: nn.Module
    name: str
    layers: nn.ModuleList
    config: Any
    options: dict[str, Any]

    def undo(self) -> None:
        """Gives the model its own layers back."""
        _exchange(self.holder, self.name, self.layers, self.config, self.options)


def replicate(model: nn.Module, config: PeftConfig, before: Replication | None, is_adapted: bool) -> Replication | None:
    """Exchanges the layers of `model` as `config` says."""
    wanted = config.replicated_layers
    if not wanted:
        return None
    pairs = tuple((int(start), int(end)) for start, end in wanted)
    if is_adapted:
        if before is not None and before.pairs == pairs:
            return None
        raise AdaptError(
            f"layer_replication={list(pairs)} changes the layers of a model that has adapters; unload them, and adapt "
            "it with this config first"
        )
    holder, name, layers = _find(model)
    for start, end in pairs:
        if not 0 <= start < end <= len(layers):
            raise AdaptError(
                f"layer_replication has the pair {(start, end)}, and the model layers 0 to {len(layers) - 1}"
            )
    count = sum(end - start for start, end in pairs)
    if count > _MOST_TIMES * len(layers):
        raise AdaptError(
            f"layer_replication makes {count} layers of the model's {len(layers)}; {_MOST_TIMES} times as many are the "
            "most that are made"
        )
    indices = [index for start, end in pairs for index in range(start, end)]
    model_config = getattr(holder, "config", None) or getattr(model, "config", None)
    options = _options(model_config, indices, len(layers))
    done = Replication(
        pairs, holder, name, layers, model_config, {option: getattr(model_config, option) for option in options}
    )
    cloned = nn.ModuleList([_clone(layers[index], place) for place, index in enumerate(indices)])
    _exchange(holder, name, cloned, model_config, options)
    return done


def _exchange(holder: nn.Module, name: str, layers: nn.ModuleList, config: Any, options: dict[str, Any]) -> None:
    set_attribute(holder, name, layers)
    for option, value in options.items():
        set_attribute(config, option, value)


def _find(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """Returns a model's layers with the module that holds them and their name in it, where PEFT looks for them."""
    inner: Any = model
    while isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model
    if isinstance(getattr(inner, "bert", None), nn.Module):
        inner = inner.bert
    for holder, name in ((inner, "layers"), (getattr(inner, "encoder", None), "layer"), (inner, "h")):
        layers = getattr(holder, name, None)
        if (
            isinstance(holder, nn.Module)
            and isinstance(layers, nn.ModuleList)
            and not isinstance(model, fx.GraphModule)
        ):
            return holder, name, layers
    raise AdaptError(
        f"layer_replication: a {type(model).__name__} has no list of layers where Transformers models of the kinds "
        "Llama, Bert and Falcon have theirs, or is a graph, which runs each layer as often as it was traced; adapt "
        "such a model before tracing it"
    )


def _clone(layer: nn.Module, index: int) -> nn.Module:
    """Returns a copy of a layer with the very same parameters."""
    cloned = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    for module in cloned.modules():
        if hasattr(module, "layer_idx"):
            module.__dict__["layer_idx"] = index  # under which a cache has what the layer keeps
    return cloned


def _options(model_config: Any, indices: list[int], before: int) -> dict[str, Any]:
    """Returns the options of a model's config that have to change with its layers."""
    options: dict[str, Any] = {}
    if hasattr(model_config, "num_hidden_layers"):
        options["num_hidden_layers"] = len(indices)
    types = getattr(model_config, "layer_types", None)
    if isinstance(types, list) and len(types) == before:
        options["layer_types"] = [types[index] for index in indices]
    return options
