"""Prefixes that begin as what a model itself keeps in its cache for a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphpeft.adapters import checkpoint, lifecycle, merged_weights
from graphpeft.adapters.adapting import known_adapter, known_adapters, modules_of
from graphpeft.adapters.loading import set_values
from graphpeft.graph.modes import in_mode
from graphpeft.graph.paths import unwrapped
from graphpeft.methods.prompts.caches import CACHES
from graphpeft.methods.prompts.encoders import EMBEDDINGS_KEY
from graphpeft.methods.prompts.prefix_config import PrefixConfig
from graphpeft.wording import joined, number_of


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """Returns the keys and values of a cache's first tokens as a prefix, as files have it.

    Args:
        past_key_values: A cache of Transformers after one sequence; or a key and a value for each layer, of shape (1,
            heads, tokens, head size).
        num_virtual_tokens: The number of tokens.

    Returns:
        The prefix, of shape (tokens, 2 · layers · heads · head size), in the cache's dtype.

    Raises:
        TypeError: If it is no cache.
        ValueError: If the cache has fewer tokens, no longer has the first ones, has those of several sequences, or has
            keys of several sizes.

    Examples:
        >>> keys, values = torch.zeros(1, 2, 5, 4), torch.ones(1, 2, 5, 4)
        >>> prompt_embeddings_from_past_key_values([(keys, values)], num_virtual_tokens=3).shape
        torch.Size([3, 16])
    """
    pairs = _keys_and_values(past_key_values)
    if not pairs:
        raise ValueError("the cache is empty; run the model on a text with it first")
    parts = [part for pair in pairs for part in pair]
    first = parts[0].shape
    if any(part.ndim != 4 or (*part.shape[:2], part.shape[3]) != (*first[:2], first[3]) for part in parts):
        shapes = dict.fromkeys(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"keys and values must be of one size in all layers, and have the shapes {joined([*shapes])}")
    if first[0] != 1:
        raise ValueError(f"the cache is of {first[0]} sequences; run the model on one alone")
    fewest = min(part.shape[2] for part in parts)
    if not 0 < num_virtual_tokens <= fewest:
        raise ValueError(f"the cache has {number_of(fewest, 'token')}, and num_virtual_tokens is {num_virtual_tokens}")
    rows = [part[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1) for part in parts]
    return torch.cat(rows, dim=1)


def _keys_and_values(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Returns the keys and values that each layer has filled."""
    if isinstance(cache, tuple | list) and all(isinstance(pair, tuple | list) and len(pair) > 1 for pair in cache):
        return [(pair[0], pair[1]) for pair in cache]
    layers = getattr(cache, "layers", None)
    if layers is None or not all(isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
        raise TypeError(
            f"a {type(cache).__name__} doesn't tell the keys of each layer; pass a DynamicCache that a model has "
            "filled, or a key and a value for each layer"
        )
    found = []
    for number, layer in enumerate(layers):
        seen, kept = int(layer.get_seq_length()), layer.keys.shape[2]
        if kept < seen:
            raise ValueError(
                f"layer {number} keeps {kept} of {seen} tokens, and no longer the first ones; run the model on a "
                "shorter text, as max_length gives one"
            )
        # a cache of a fixed size has room behind them
        found.append((layer.keys[:, :, :seen], layer.values[:, :, :seen]))
    return found


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Gives a cartridge, or the table of prefix tuning, the keys and values of a cache's first tokens.

    Args:
        model: An adapted model, also inside of PyTorch's wrappers.
        adapter_name: The adapter's name; None for the active one.
        past_key_values: The cache, as in `prompt_embeddings_from_past_key_values`.
        num_virtual_tokens: The number of tokens, which must be that of the adapter; None for that.

    Returns:
        The prefix, of shape (tokens, 2 · layers · heads · head size), in the cache's dtype.

    Raises:
        AdaptError: If the model has no adapter of this name.
        TypeError: If it is no cache.
        ValueError: If the adapter is of another kind, or the cache's keys and values aren't of its size; the adapter is
            as it was.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)).eval()
        >>> cache = base(torch.arange(8)[None], use_cache=True).past_key_values
        >>> model = get_peft_model(base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        >>> initialize_kv_prefix_from_past_key_values(model, past_key_values=cache).shape
        torch.Size([4, 64])
    """
    model = unwrapped(model)
    name, config = _prefix_of(model, adapter_name)
    tokens = config.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens
    assert tokens is not None
    prefix = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=tokens)
    if prefix.shape != (config.num_virtual_tokens, config.width):
        raise ValueError(
            f"the cache gives a prefix of shape {tuple(prefix.shape)}, and {name!r} has one of "
            f"{(config.num_virtual_tokens, config.width)}; leave num_virtual_tokens out, and take a cache of this model"
        )
    state = known_adapters(model)
    originals = merged_weights.Originals(model, state)
    values = checkpoint.state_dict_of(modules_of(model), state.by_name[name], name, originals, None)
    set_values(model, name, values | {EMBEDDINGS_KEY: prefix})
    return prefix


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Gives a cartridge, or the table of prefix tuning, the keys and values of a text's first tokens.

    The model reads the whole text once, in evaluation and without its adapters.

    Args:
        model: An adapted model, also inside of PyTorch's wrappers.
        tokenizer: The model's tokenizer.
        text: The text, which has at least as many tokens as the adapter.
        adapter_name: The adapter's name; None for the active one.
        num_virtual_tokens: The number of tokens, which must be that of the adapter; None for that.
        use_chat_template: Whether the text becomes a system's message by the tokenizer's chat template, if it has one.
        max_length: How many tokens are read at most; None for all.

    Returns:
        The prefix, of shape (tokens, 2 · layers · heads · head size), in the model's dtype.

    Raises:
        AdaptError: If the model has no adapter of this name.
        ValueError: If the adapter is of another kind, or the text has too few tokens, or more than a layer keeps; the
            adapter is as it was.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=128))
        >>> model = get_peft_model(base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        >>> def tokenizer(text, **options):
        ...     return {"input_ids": torch.tensor([[ord(letter) for letter in text]])}
        >>> initialize_kv_prefix_from_text(model, tokenizer, text="What a model should know.").shape
        torch.Size([4, 64])
    """
    model = unwrapped(model)
    name, _ = _prefix_of(model, adapter_name)
    ids = _token_ids(tokenizer, text, use_chat_template, max_length)
    ids = ids.to(model.get_input_embeddings().weight.device)
    with lifecycle.Paused(model), in_mode(model, training=False):
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    cache = next(outputs[key] for key in CACHES if key in outputs)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def _token_ids(tokenizer: Any, text: str, use_chat_template: bool, max_length: int | None) -> Tensor:
    """Returns the ids of a text's tokens, (1, tokens)."""
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        messages = [{"role": "system", "content": text}]
        options: dict[str, Any] = {"tokenize": True, "add_generation_prompt": False, "return_dict": False}
        try:
            return tokenizer.apply_chat_template(messages, **options, return_tensors="pt")[:, :max_length]
        except (TypeError, ValueError):
            pass  # it has no template, or one without such a message
    return tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length)["input_ids"]


def _prefix_of(model: Any, adapter_name: str | None) -> tuple[str, PrefixConfig]:
    """Returns the name and the config of an adapter that has keys and values as parameters."""
    active = known_adapters(model).active
    if adapter_name is None and len(active) != 1:
        raise ValueError(f"{active} are active; say by adapter_name which of the adapters is meant")
    name = active[0] if adapter_name is None else adapter_name
    config = known_adapter(model, name).config
    if not isinstance(config, PrefixConfig):
        raise ValueError(f"{name!r} is a {config.method} adapter, which has no keys and values as a cartridge has")
    if config.has_encoder and not config.holds_table:
        raise ValueError(f"{name!r} computes its keys and values by a network; set prefix_projection=False")
    return name, config
