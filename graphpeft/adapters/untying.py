"""Modules whose trained copy is left or merged alone, though their tensor was tied to another module's."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from graphpeft.adapters.state import Adapters, Modules
from graphpeft.graph import overrides
from graphpeft.graph.holders import has_tensor, tensor_at
from graphpeft.graph.hosts.sharding import is_managed
from graphpeft.graph.traced_model import module_told
from graphpeft.peft_errors import PeftWarning
from graphpeft.transaction import set_attribute, set_item


def untie_saved(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Gives modules of `modules_to_save` tensors of their own where these are tied to what is trained otherwise.

    So the copy can be merged, and the module that the tensor was tied to stays as it is. Other ties stay.
    """
    for name in names:
        adapter = adapters.by_name[name]
        holders = Counter(id(t) for module in modules.values() for t in module._parameters.values() if t is not None)
        groups: dict[int, list[tuple[str, str]]] = {}
        for path in adapter.saved:
            for own in adapter.fully_trained[path] if path in modules else ():
                groups.setdefault(id(modules[path]._parameters.get(own)), []).append((path, own))
        for tensor, places in groups.items():
            there = [(modules[path], overrides.override_name(own, name)) for path, own in places]
            copies = {id(tensor_at(module, other)) for module, other in there if has_tensor(module, other)}
            if holders[tensor] > 1 and (holders[tensor] > len(places) or len(copies) > 1):
                for path, own in places:
                    _untie(modules[path], own)


def _untie(module: nn.Module, name: str) -> None:
    tensor = module._parameters[name]
    if type(tensor) is nn.Parameter and not tensor.is_meta and not is_managed(module):
        alone: Any = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
        set_item(module._parameters, name, alone)


@contextlib.contextmanager
def telling_of_untied(model: Any) -> Iterator[None]:
    """Sets `config.tie_word_embeddings` to False, with a warning, if a model's table and head come to be untied.

    Transformers would tie them again when the saved model is loaded.
    """
    was = _are_tied(model)
    yield
    about = getattr(model, "config", None)
    if was and not _are_tied(model) and getattr(about, "tie_word_embeddings", False):
        set_attribute(about, "tie_word_embeddings", False)
        warnings.warn(
            "Setting config.tie_word_embeddings to False, since the embedding and the head were tied and one of them "
            "has values of its own now, which would be lost in a saved model",
            PeftWarning,
            stacklevel=4,
        )


def _are_tied(model: Any) -> bool:
    layers = [module_told(model, getter) for getter in ("get_input_embeddings", "get_output_embeddings")]
    table, head = (getattr(layer, "_parameters", {}).get("weight") for layer in layers)
    return table is not None and table is head
