"""The sizes of the keys and values that the layers of a Transformers model keep in its cache; they may differ.

Layers of Gemma read the keys of a layer before them, and those with full attention have larger heads than the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from graphpeft.methods.prompts.model_sizes import sizes_in


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
    """Returns whether a layer keeps no keys, and reads those of a layer before it."""
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return shared > 0 and layer >= config.num_hidden_layers - shared


def size_in_layer(config: Any, layer: int) -> KeySize | None:
    """Returns the size of a layer's keys; None where the config tells of no layer apart."""
    by_layer = getattr(config, "per_layer_config", None)
    if by_layer is None or not getattr(config, "layer_types", None):
        return None
    of_head = getattr(by_layer[layer], "head_dim", None)
    # layers may differ in other things than their heads
    return None if of_head is None else KeySize(by_layer[layer].num_key_value_heads, of_head)


def sizes_in_layers(config: Any) -> list[KeySize]:
    """Returns the sizes of the keys of all layers that keep some; none where the config tells of no layer apart."""
    if size_in_layer(config, 0) is None:
        return []
    keeping = [layer for layer in range(config.num_hidden_layers) if not reads_those_of_others(config, layer)]
    return [size for size in (size_in_layer(config, layer) for layer in keeping) if size is not None]


def default_sizes(config: Any) -> dict[str, int]:
    """Returns the sizes of keys and values where fewer heads have them than there are, as PEFT works them out."""
    by_layer = sizes_in_layers(config)
    if by_layer:
        # such a config tells no size that all layers have
        heads, size = max(by_layer, key=lambda size: size.of_head)
        return {"token_dim": size * heads, "num_attention_heads": heads}
    heads = getattr(config, "num_key_value_heads", None)
    if heads is None:
        return {}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"token_dim": size * heads, "num_attention_heads": heads}


def possible_sizes(config: Any) -> dict[str, list[int]]:
    """Returns how many heads, and layers, a model's own caches may have; a model of two parts has several numbers."""
    by_layer = sizes_in_layers(config)
    # a model in which all heads share one key says so, in one way or another
    shares = hasattr(config, "num_kv_heads") or getattr(config, "multi_query", False)
    heads = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
    if by_layer:
        heads = ()
    elif getattr(config, "num_key_value_heads", None) is not None:
        heads = ("num_key_value_heads",)
    asked = {
        "num_attention_heads": () if shares else heads,
        "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "decoder_layers", "num_decoder_layers"),
    }
    found = sizes_in(config, asked)
    found["num_attention_heads"] += [size.heads for size in by_layer if size.heads is not None]
    return {name: sorted(set(sizes)) for name, sizes in found.items()}
