"""Caches of keys and values as tensors, for generation token by token.

A model of Transformers takes a ``DynamicCache``, and returns it with the positions of the call added. Its program takes
tensors ``past_key_values.0.key``, ``past_key_values.0.value``, and so on, and returns ``present.0.key``, and so on, of
the shape (batch, heads, positions, size of a head). A first call has empty ones, of 0 positions.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from graphpeft._torch import pytree
from graphpeft.exporting import copies
from graphpeft.exporting.errors import ExportError
from graphpeft.exporting.example import Example
from graphpeft.graph.paths import unwrapped
from graphpeft.wording import joined

Layers = list[dict[str, Tensor]]
"""The key and the value of each layer."""

PAST, PRESENT = "past_key_values", "present"
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
"""The names in files."""

_NAMES = ("cache", "past_key_values")
"""The names of the cache among the arguments of Transformers' models, the newer one first."""


def generation_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
    """Returns example inputs with which `export` writes a model that generates with a cache.

    The inputs are those of a second call, after one with the same ids. In the file, the cache is tensors with the names
    that optimum, ONNX Runtime GenAI and Transformers.js read: inputs such as ``past_key_values.0.key`` and
    ``past_key_values.0.value``, and results such as ``present.0.key`` and ``present.0.value``.

    Args:
        model: A model of Transformers that generates, with or without adapters; it isn't changed.
        input_ids: The ids of tokens, int64 of shape (batch, tokens).
        attention_mask: 1 for tokens and 0 for padding, which is on the left, int64 of shape (batch, tokens); None means
            no padding.

    Returns:
        The ids, the filled cache, and what else the model takes of a mask of all positions and the new positions.

    Raises:
        ExportError: If the model takes no cache, or doesn't return logits and a ``DynamicCache``.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
        >>> inputs = generation_inputs(model, torch.tensor([[3, 1, 4], [1, 5, 9]]))
        >>> {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        {'input_ids': (2, 3), 'attention_mask': (2, 6), 'position_ids': (2, 3)}
    """
    copied = copies.sharing_weights(unwrapped(model))
    taken = inspect.signature(copied.forward).parameters
    name = next((name for name in _NAMES if name in taken), None)
    if name is None:
        raise ExportError(f"the {type(model).__name__} takes no {' or '.join(_NAMES)}, with which it would generate")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    first = _call_with(input_ids, mask, _positions(mask), taken)
    # of full layers, where a model's own may keep a window of positions alone
    cache = importlib.import_module("transformers").DynamicCache()
    with torch.no_grad():
        _returned_caches(copied, copied(**first, **{name: cache}, use_cache=True))
    positions = _layers_of(cache)[0]["key"].shape[2]
    if positions != input_ids.shape[1]:
        raise ExportError(
            f"a first call with {input_ids.shape[1]} tokens puts {positions} positions into the cache, since an "
            "adapter has prompts there, which later calls don't add; a file computes the same in each call. Export "
            "the model with use_cache=False"
        )
    rows = mask.new_ones(input_ids.shape)
    second = _call_with(input_ids, torch.cat([mask, rows], 1), _positions(mask)[:, -1:] + rows.cumsum(1), taken)
    return {**second, name: cache}


def _call_with(ids: Tensor, mask: Tensor, positions: Tensor, taken: Iterable[str]) -> dict[str, Tensor]:
    return {name: value for name, value in ((IDS, ids), (MASK, mask), (POSITIONS, positions)) if name in taken}


def _positions(mask: Tensor) -> Tensor:
    """Returns the position of each token among those that are no padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def has_cache(example: Example) -> bool:
    """Returns whether an example has a cache, taken apart or not."""
    return PAST in example.kwargs


def taken_apart(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """Returns a model and an example with tensors in the place of a cache; both as they are if there is no cache."""
    caches = {name: value for name, value in example.kwargs.items() if name in _NAMES and _is_cache(value)}
    inside = [leaf for leaf in pytree.tree_leaves(tuple(example)) if _is_cache(leaf)]
    if not inside:
        return model, example
    tensors = {name for name, value in example.kwargs.items() if Example((value,), {}).tensors}
    is_alone = len(inside) == len(caches) == 1 and not example.args
    if not is_alone or not {IDS} <= tensors <= {IDS, MASK, POSITIONS}:
        given = joined([*map(str, range(len(example.args))), *example.kwargs])
        raise ExportError(
            f"beside a cache, an export takes {IDS}, {MASK} and {POSITIONS}, all by name, and example_inputs has "
            f"{given}; make it by generation_inputs"
        )
    [(name, cache)] = caches.items()
    layers = _layers_of(cache)
    copied = copies.sharing_weights(model)
    join = functools.partial(_join, type(cache), type(cache.layers[0]), name)
    copied.register_forward_pre_hook(join, with_kwargs=True)
    copied.register_forward_hook(_split)
    others = {other: value for other, value in example.kwargs.items() if other != name}
    return copied, Example((), {**others, PAST: layers})


def _is_cache(value: Any) -> bool:
    return any(kind.__name__ == "Cache" and kind.__module__.startswith("transformers.") for kind in type(value).__mro__)


def _layers_of(cache: Any) -> Layers:
    """Returns the key and value of each layer of a cache."""
    others = [type(layer).__name__ for layer in getattr(cache, "layers", ()) if type(layer).__name__ != "DynamicLayer"]
    if type(cache).__name__ != "DynamicCache" or others:
        raise ExportError(
            f"the cache is a {type(cache).__name__}{f' of {joined(others)}' if others else ''}; an export takes a "
            "DynamicCache whose layers keep the keys and values of all positions, as generation_inputs makes it. If "
            "the model needs another one, export it with use_cache=False"
        )
    if not cache.layers or not all(layer.is_initialized and layer.keys.numel() for layer in cache.layers):
        raise ExportError(
            "the cache is empty, and an example has to show the shapes of keys and values; give example_inputs that "
            "generation_inputs has made"
        )
    return [{"key": layer.keys.detach(), "value": layer.values.detach()} for layer in cache.layers]


def _join(cache: Any, layer: Any, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gives a model a cache with the tensors, in a hook before its forward."""
    layers = kwargs.pop(PAST)
    (rows, new), past = kwargs[IDS].shape, layers[0]["key"].shape[2]
    # conditions of a program; without them, its sizes would be apart, and those of other masks a way of their own
    for own, shape in ((MASK, (rows, past + new)), (POSITIONS, (rows, new))):
        if own in kwargs and tuple(kwargs[own].shape) != shape:
            raise ValueError(f"{own} is to have the shape {shape} beside these {IDS} and {PAST}")
    whole = cache()
    for given in layers:
        if given["key"].shape[2] != past:
            raise ValueError(f"{PAST} is to have as many positions in each layer")
        held = layer()  # of all positions, also where a window is shorter: the mask leaves out what is outside of it
        # not by its update, which concatenates an empty tensor of another rank, as OpenVINO can't
        held.keys, held.values, held.is_initialized = given["key"], given["value"], True
        held.device, held.dtype = given["key"].device, given["key"].dtype
        whole.layers.append(held)
    return args, {"use_cache": True, **kwargs, name: whole}


def _split(module: nn.Module, _: tuple[Any, ...], output: Any) -> dict[str, Any]:
    """Returns the output with the tensors of the cache, in a hook behind a forward."""
    caches = _returned_caches(module, output)
    [cache] = caches.values()
    kept = {name: value for name, value in output.items() if name not in caches and value is not None}
    return {**kept, PRESENT: [{"key": layer.keys, "value": layer.values} for layer in cache.layers]}


def _returned_caches(model: nn.Module, output: Any) -> dict[str, Any]:
    """Returns the one cache in a model's output, by its name there."""
    named = dict(output) if isinstance(output, Mapping) else {}
    caches = {name: value for name, value in named.items() if _is_cache(value)}
    if len(caches) != 1 or "logits" not in named:
        raise ExportError(
            f"the {type(model).__name__} returns {type(output).__name__} without logits and a cache, which generation "
            "needs; give a model with a head, and let it return a dictionary"
        )
    return caches


def open_sizes(arguments: Mapping[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the dynamic sizes of arguments: the batch, the new tokens and the cache's positions are one each.

    PyTorch's exporter would only find that sizes are equal where the model compares them.
    """
    if PAST not in arguments:
        return spec
    batch, tokens, past = Dim("batch"), Dim("tokens"), Dim("past")
    layer = {"key": {0: batch, 2: past}, "value": {0: batch, 2: past}}
    new = {0: batch, 1: tokens}
    named = {IDS: new, POSITIONS: new, MASK: {0: batch, 1: Dim.AUTO}, PAST: [layer for _ in arguments[PAST]]}
    return spec | {name: named[name] for name in named.keys() & arguments.keys()}


# generating


def first_call(example: Example) -> Example:
    """Returns the call that begins to generate: the ids, their part of the mask, and an empty cache."""
    ids, past = example.kwargs[IDS], example.kwargs[PAST]
    mask = example.kwargs.get(MASK, torch.ones_like(ids))[:, : ids.shape[1]]
    # new tensors, since ExecuTorch ends the process for an empty slice, which has the strides of the whole
    empty = [{name: _without_positions(tensor) for name, tensor in layer.items()} for layer in past]
    return Example((), {**example.kwargs, **_call_with(ids, mask, _positions(mask), example.kwargs), PAST: empty})


def _without_positions(tensor: Tensor) -> Tensor:
    rows, heads, _, size = tensor.shape
    return tensor.new_zeros(rows, heads, 0, size)


def next_call(example: Example, tokens: Tensor, present: Layers) -> Example:
    """Returns the call after another one.

    Args:
        example: The call before.
        tokens: The new tokens, int64 of shape (batch, 1).
        present: The cache that the call has returned.
    """
    one = torch.ones_like(tokens)
    mask = torch.cat([example.kwargs.get(MASK, one), one], 1)
    positions = example.kwargs.get(POSITIONS, one)[:, -1:] + 1
    return Example((), {**example.kwargs, **_call_with(tokens, mask, positions, example.kwargs), PAST: present})
