"""Keys and values of Shadow's small model, in layers of the large one's cache behind its own.

So whatever is done to the cache while text is generated, such as a choice of beams, is done to both.
"""

from __future__ import annotations

from typing import Any

from graphpeft.methods.prompts.caches import has_tokens

_FIRST = "_graphpeft_shadow_layers"


def first_layer_in(cache: Any, key: int, layers: int, config: Any) -> int | None:
    """Returns the number of the first of the small model's layers in a cache; an empty cache gets these.

    Args:
        cache: The cache of the call, or None.
        key: What tells the adapter from another one.
        layers: The number of the large model's layers.
        config: The small model's config.

    Returns:
        The number, or None if the small model keeps nothing: without a cache, or in one with a place for each layer of
        the large model alone.

    Raises:
        ValueError: If the cache has tokens that the small model hasn't seen.
    """
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
