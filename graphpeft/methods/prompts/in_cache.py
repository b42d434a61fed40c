"""Puts learned keys and values into an empty cache of a Transformers model, before the first token.

    cache[layer] = (P[2 · layer], P[2 · layer + 1])            P of shape (2 · layers, heads, tokens, head size)

The attention mask gets longer, and positions move behind them. The same numbers as PEFT's ``peft_model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompts.caches import (
    CACHES,
    cache_of,
    first_not_none,
    has_tokens,
    under_one_name,
)
from graphpeft.methods.prompts.key_sizes import reads_those_of_others, size_in_layer
from graphpeft.methods.prompts.lengthening import checked_positions, exceeds_positions, lengthened_for, shifted
from graphpeft.methods.prompts.placement import Placement
from graphpeft.sites.site import CallSite


@dataclass(frozen=True)
class InCache(Placement):
    """Into an empty cache, before the first token.

    Attributes:
        tokens: The number of virtual tokens.
        layers: The number of layers.
        heads: The number of heads that have keys.
        cache_names: The other name of the cache.
        counts: Whether positions that aren't given are counted by the attention mask, as `generate` counts them.
    """

    tokens: int
    layers: int
    heads: int
    cache_names: tuple[str, ...]
    counts: bool

    spends: ClassVar[tuple[str, ...]] = CACHES

    @property
    def asks(self) -> tuple[str, ...]:
        """The other name of the cache."""
        return self.cache_names

    def check(self, site: CallSite) -> str | None:
        """Returns the reason why the module can't take a prefix, or None."""
        return exceeds_positions(self.tokens, site.positions)

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Fills the cache, and lengthens the mask and moves the positions accordingly."""
        changed, cache = {}, cache_of(inputs)
        tokens = first_not_none(inputs.get("input_ids"), inputs.get("inputs_embeds"))
        # before the cache is filled
        if "attention_mask" in inputs:
            changed["attention_mask"] = lengthened_for(inputs["attention_mask"], self.tokens, tokens, cache)
        if "position_ids" in inputs:
            positions = checked_positions(inputs["position_ids"], self.tokens, tokens, cache)
            if self.counts and "attention_mask" in inputs:
                positions = counted(positions, inputs["attention_mask"], tokens)
            changed["position_ids"] = shifted(positions, self.tokens)
        cache = filled(cache, prompt, tokens, (self.layers, self.heads), word_embeddings, config)
        changed |= under_one_name(cache, inputs)
        return changed

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Takes the cache out of the output where none was asked for; refuses a forward that doesn't read it."""
        output = with_cache_read(output, cache_of(entered), self.tokens)
        return without_cache(output, cache_of(inputs), inputs["use_cache"]) if "use_cache" in inputs else output


@recorded
def counted(position_ids: Tensor | None, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Returns the positions of tokens, (batch, length); counted by their mask where they aren't given.

    `generate` counts them so, and a row's result doesn't depend on its padding: the keys of a prefix have no position
    of their own, so padding that is counted would move the tokens away from them. Padding behind the last token is
    counted, as a model does by itself.

    Args:
        position_ids: The positions, (batch, length), or None.
        mask: The attention mask of all tokens, those in the cache first, (batch, all), or None.
        tokens: The ids or the embeddings of the input, (batch, length, …).
    """
    if position_ids is not None or mask is None:
        return position_ids
    is_token = mask != 0
    is_behind = is_token.flip(-1).cumsum(-1).flip(-1) == 0
    return ((is_token | is_behind).cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]


@recorded
def filled(
    cache: Any,
    prefix: Tensor,
    tokens: Tensor,
    sizes: tuple[int, int],
    word_embeddings: Any,
    config: Any,
) -> Any:
    """Returns the cache with a prefix in it, unless it holds tokens already.

    Args:
        cache: A cache of Transformers; None makes one.
        prefix: Keys and values, (tokens, 2 · layers · heads · head size).
        tokens: The ids or the embeddings of the input, (batch, length, …).
        sizes: The number of layers, and the number of heads that have keys.
        word_embeddings: The model's word embedding, whose dtype the cache gets.
        config: The model's config.
    """
    if has_tokens(cache):
        return cache
    from transformers import DynamicCache, EncoderDecoderCache

    layers, heads = sizes
    by_layer = prefix.to(word_embeddings.weight.dtype).view(prefix.shape[0], 2 * layers, heads, -1).permute(1, 2, 0, 3)
    by_layer = by_layer[:, None].expand(-1, tokens.shape[0], -1, -1, -1)
    if cache is None and config.is_encoder_decoder:
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    elif cache is None:
        cache = DynamicCache(config=config)
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    # PEFT lays out four rows a layer there, and the decoder's own attention reads the first two
    step = 4 if config.is_encoder_decoder else 2
    for layer in range(layers):
        row = step * layer % (2 * layers)
        key, value = by_layer[row], by_layer[row + 1]
        if not config.is_encoder_decoder:
            text = config.get_text_config()
            size = size_in_layer(text, layer)
            if reads_those_of_others(text, layer):
                continue
            if size is not None:
                key, value = (part[:, : size.heads, :, : size.of_head] for part in (key, value))
        own.update(key, value, layer)
    return cache


@recorded
def with_cache_read(output: Any, cache: Any, tokens: int) -> Any:
    """Returns a module's output."""
    if cache.get_seq_length() <= tokens:
        raise ValueError(
            "no attention has read the prefix: the forward that was given it as its past_key_values or cache has to "
            "hand that on to the layers; mend that, or adapt the model inside"
        )
    return output


@recorded
def without_cache(output: Any, cache: Any, use_cache: bool | None) -> Any:
    """Returns a model's output without its cache, which `generate` would read, where the caller wanted none."""
    if use_cache is not False or cache is not None or isinstance(output, tuple):
        return output
    return type(output)(**{name: value for name, value in output.items() if name not in CACHES})
