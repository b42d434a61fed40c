"""Refuses another size of the vocabulary where an adapter is on a layer with a row for each token."""

from __future__ import annotations

from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapters, Modules
from graphpeft.graph.traced_model import module_told
from graphpeft.targeting.embedding_layers import embedding_layers


def refuse_resizing(modules: Modules, adapters: Adapters, size: int | None, multiple: int | None) -> None:
    """Raises AdaptError if a Transformers model's embeddings can't be resized, since adapters are on them.

    Args:
        modules: The model's modules by path.
        adapters: Its adapters.
        size: How many tokens the vocabulary is to have; None for as many as it has.
        multiple: What the size is rounded up to a multiple of; None for nothing.
    """
    embedding = module_told(modules[""], "get_input_embeddings")
    if multiple is None and (size is None or size == getattr(embedding, "num_embeddings", None)):
        return
    layers = embedding_layers(modules)
    for name, adapter in adapters.by_name.items():
        path = next((path for path, _ in adapter.tensor_names(name) if path in layers), None)
        if path is not None:
            raise AdaptError(
                f"adapter {name!r} is on {path}, which resize_token_embeddings exchanges or gives another size: resize "
                "the model before you adapt it, or take the adapters off first with unload() or merge_and_unload()"
            )
