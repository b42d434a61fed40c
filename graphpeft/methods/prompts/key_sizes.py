"""The sizes of the keys and values that the layers of a Transformers model keep in its cache, where they differ.

Layers of Gemma read the keys of a layer before them, and those with full attention have larger heads than the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class KeySize(NamedTuple):
    """The size of a layer's keys for one token.

    Attributes:
        heads: How many heads have keys.
        of_head: The size of a head.
    """

    heads: int
    of_head: int

    def fits(self, heads: int, of_head: int) -> bool:
        """Returns whether the keys have at most this many heads, of at most this size."""
        return self.heads <= heads and self.of_head <= of_head


def reads_those_of_others(config: Any, layer: int) -> bool:
    """Returns whether a layer keeps no keys, and reads those of a layer before it.

    Args:
        config: The config of a model's text.
        layer: The number of the layer.
    """
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return shared > 0 and layer >= config.num_hidden_layers - shared


def size_in_layer(config: Any, layer: int) -> KeySize | None:
    """Returns the size of a layer's keys; None where the config tells of no layer apart.

    Args:
        config: The config of a model's text, or None.
        layer: The number of the layer.
    """
    by_layer = getattr(config, "per_layer_config", None)
    if by_layer is None or not getattr(config, "layer_types", None):
        return None
    of_head = getattr(by_layer[layer], "head_dim", None)
    # layers may differ in other things than their heads
    return None if of_head is None else KeySize(by_layer[layer].num_key_value_heads, of_head)


def sizes_in_layers(config: Any) -> list[KeySize]:
    """Returns the sizes of the keys of all layers that keep some; none where the config tells of no layer apart.

    Args:
        config: The config of a model's text, or None.
    """
    if size_in_layer(config, 0) is None:
        return []
    keeping = [layer for layer in range(config.num_hidden_layers) if not reads_those_of_others(config, layer)]
    return [size for size in (size_in_layer(config, layer) for layer in keeping) if size is not None]
