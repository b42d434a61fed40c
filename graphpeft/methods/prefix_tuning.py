"""Prefix tuning: learned keys and values in front of the keys and values of every layer's attention.

    cache[layer] = (P[2 · layer], P[2 · layer + 1])            P of shape (2 · layers, heads, tokens, head size)

They are the content of the cache before the first token. With `prefix_projection` a perceptron computes P from a
smaller table. Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190;
the same numbers as PEFT's ``tuners/prefix_tuning/model.py`` and ``peft_model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompts.caches import (
    CACHES,
    cache_of,
    first_not_none,
    has_tokens,
    other_cache_names,
    under_one_name,
)
from graphpeft.methods.prompts.encoders import Encoder, NetworkEncoder, Table, linear_by
from graphpeft.methods.prompts.key_sizes import reads_those_of_others, size_in_layer, sizes_in_layers
from graphpeft.methods.prompts.placements import (
    Placement,
    PromptRule,
    checked_positions,
    exceeds_positions,
    lengthened_for,
    shifted,
)
from graphpeft.methods.prompts.prompt_config import PromptLearningConfig, sizes_in, text_config_of
from graphpeft.methods.prompts.transformers_sites import GENERATOR, cache_sites
from graphpeft.rules.options import Size
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.rule import Rule
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite


@register
@dataclass(kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning's options; the names, defaults and meanings are PEFT's.

    Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.

    Attributes:
        init_weights: ``"zero"`` begins with keys and values of zero; None draws them.
        encoder_hidden_size: The width of the perceptron; `token_dim` if None.
        prefix_projection: Whether a perceptron computes the prefix.

    Raises:
        ValueError: For a value that an option can't have.

    Example:
        >>> config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, prefix_projection=True)
    """

    peft_type: ClassVar[PeftType] = PeftType.PREFIX_TUNING

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: Size | None = None
    prefix_projection: bool = False

    def check(self) -> None:
        """Raises ValueError for options that prefix tuning doesn't have."""
        super().check()
        if self.prompt_scope is not None:
            raise ValueError("prompt_scope has no effect on a prefix, which goes into the cache; use prompt tuning")

    def resolved(self, model: nn.Module) -> PrefixTuningConfig:
        """Returns the config with the sizes of the model's keys and values filled in."""
        sizes = {} if self.token_dim is not None else _key_sizes(model)
        config = super().resolved(model)
        assert isinstance(config, PrefixTuningConfig)
        for name, size in sizes.items():
            setattr(config, name, size)
        if config.encoder_hidden_size is None:
            config.encoder_hidden_size = config.token_dim
        return config

    @property
    def has_encoder(self) -> bool:
        """Whether something computes the virtual tokens in training."""
        return self.prefix_projection

    def encoder(self) -> Encoder:
        """Returns the encoder of the prefix in training."""
        return Projection() if self.prefix_projection else PrefixTable()

    def find_sites(self, finder: SiteFinder, report: Report) -> list[CallSite]:
        """Returns the boundary of the module that takes a cache."""
        if any(getattr(module, "gradient_checkpointing", False) for module in finder.modules.values()):
            reason = "prefix tuning works through the cache, which gradient checkpointing switches off"
            report.refused.append(Refusal("the model", reason, "call gradient_checkpointing_disable() on the model"))
            return []
        return cache_sites(finder, report) if self._fits_cache(finder.modules[""], report) else []

    def _fits_cache(self, model: nn.Module, report: Report) -> bool:
        """Returns whether the prefix can be keys and values of the model, and reports if it can't."""
        known = _sizes_of_cache(model)
        reasons = [
            f"{name} is {getattr(self, name)}, and the model has {' or '.join(map(str, sizes))}"
            for name, sizes in known.items()
            if sizes and getattr(self, name) not in sizes
        ]
        if self.token_dim and self.num_attention_heads and self.token_dim % self.num_attention_heads:
            reasons.append(f"token_dim={self.token_dim} is no multiple of num_attention_heads")
        elif not reasons and not self._fits_layers(model, report):
            return False
        report.refused += [Refusal("the model", reason, "leave the sizes out of the config") for reason in reasons]
        return not reasons

    def _fits_layers(self, model: nn.Module, report: Report) -> bool:
        """Returns whether the prefix is wide enough for all layers, and reports if it isn't; PEFT leaves some out."""
        assert self.num_attention_heads is not None
        assert self.token_dim is not None
        of_head, sizes = self.token_dim // self.num_attention_heads, sizes_in_layers(text_config_of(model))
        wider = [size for size in sizes if not size.fits(self.num_attention_heads, of_head)]
        if wider:
            heads, widest = max(size.heads for size in sizes), max(size.of_head for size in sizes)
            report.refused.append(
                Refusal(
                    "the model",
                    f"{len(wider)} of {len(sizes)} layers have keys of {wider[0].heads} heads of size "
                    f"{wider[0].of_head}, and the prefix has {self.num_attention_heads} of size {of_head}",
                    f"set token_dim={heads * widest} and num_attention_heads={heads}, which fits all layers",
                )
            )
        return not wider

    def rule_for(self, site: CallSite, dtype: torch.dtype) -> Rule:
        """Returns the rule for a boundary."""
        assert self.num_virtual_tokens is not None
        assert self.num_layers is not None
        assert self.num_attention_heads is not None
        encoder = PrefixTable() if self.holds_table else self.encoder()
        sizes = (self.num_virtual_tokens, self.num_layers, self.num_attention_heads)
        counts = site.role == GENERATOR
        return PromptRule(encoder, InCache(*sizes, other_cache_names(site.arguments), counts))


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
        """Takes the cache out of the output where none was asked for."""
        return without_cache(output, cache_of(inputs), inputs["use_cache"]) if "use_cache" in inputs else output


@dataclass(frozen=True)
class PrefixTable(Table):
    """Keys and values that are parameters themselves."""

    def shape(self, config: Any) -> tuple[int, int]:
        """Returns the shape of the table: (tokens, 2 · layers · heads · head size)."""
        return config.num_virtual_tokens, _width(config)

    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Draws the table as ``nn.Embedding`` does, or makes it zero."""
        super().initialise(parameters, config, embedding)
        if config.init_weights == "zero":
            nn.init.zeros_(parameters["prompt_embeddings"])


@dataclass(frozen=True)
class Projection(NetworkEncoder):
    """Keys and values that a perceptron with one hidden layer computes."""

    def network(self, config: Any) -> nn.Module:
        """Returns the learned tokens and the perceptron."""
        dim, hidden = config.token_dim, config.encoder_hidden_size
        embedding = nn.Embedding(config.num_virtual_tokens, dim)
        layers = (nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, _width(config)))
        return nn.ModuleDict({"embedding": embedding, "transform": nn.Sequential(*layers)})

    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Draws them; the last layer begins with zeros where the config says so."""
        super().initialise(parameters, config, embedding)
        if config.init_weights == "zero":
            nn.init.zeros_(parameters["prompt_transform_2_weight"])
            nn.init.zeros_(parameters["prompt_transform_2_bias"])

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the keys and values, (tokens, 2 · layers · heads · head size)."""
        hidden = torch.tanh(linear_by("transform_0", parameters["prompt_embedding_weight"], parameters))
        return linear_by("transform_2", hidden, parameters)


def _width(config: Any) -> int:
    return 2 * config.num_layers * config.token_dim


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
def without_cache(output: Any, cache: Any, use_cache: bool | None) -> Any:
    """Returns a model's output without its cache, which `generate` would read, where the caller wanted none."""
    if use_cache is not False or cache is not None or isinstance(output, tuple):
        return output
    return type(output)(**{name: value for name, value in output.items() if name not in CACHES})


def _key_sizes(model: nn.Module) -> dict[str, int]:
    """Returns the sizes of keys and values where fewer heads have them than there are, as PEFT works them out."""
    config = text_config_of(model)
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


def _sizes_of_cache(model: nn.Module) -> dict[str, list[int]]:
    """Returns how many heads, and layers, a model's own caches may have; a model of two parts has several numbers."""
    config = text_config_of(model)
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
    found["num_attention_heads"] += [
        size.heads for size in sizes_in_layers(text_config_of(model)) if size.heads is not None
    ]
    return {name: sorted(set(sizes)) for name, sizes in found.items()}
