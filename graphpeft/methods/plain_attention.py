"""Attentions whose queries, keys and values are known from the layers that compute them.

    a = W_o softmax(R q (R k)ᵀ / √d) v        q = W_q h, k = W_k h, v = W_v h, in heads of size d

The names of layers alone don't tell that: some models norm their queries, or rotate them in another way. So what a
module's own forward returns is compared with this on random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph import in_place
from graphpeft.graph.errors import OUT_OF_MEMORY
from graphpeft.graph.modes import in_mode
from graphpeft.sites.layer_kinds import declared_features, declares_features
from graphpeft.wording import joined

HIDDEN, POSITIONS, MASK = "hidden_states", "position_embeddings", "attention_mask"
"""The arguments of an attention: what goes in, the cosines and sines of the rotation by position, and the mask."""

_SEPARATE = ("q_proj", "k_proj", "v_proj")
_OUTPUTS = ("o_proj", "out_proj")
_FUSED = "c_attn"

_KNOWN = frozenset(
    {
        "transformers.models.llama.modeling_llama.LlamaAttention",
        "transformers.models.mistral.modeling_mistral.MistralAttention",
        "transformers.models.gpt2.modeling_gpt2.GPT2Attention",
    }
)
"""Classes that need no comparison."""


class NotPlainError(Exception):
    """An attention whose queries, keys and values aren't known; the message says why."""


class Heads(NamedTuple):
    """The heads of an attention.

    Attributes:
        width: The size of a hidden state.
        size: The size of a head.
        is_fused: Whether one layer computes queries, keys and values, one behind the other.
        rotates: Whether queries and keys are rotated by position.
        layers: The layers by what they compute: q, k, v, and o if there is an output layer to apply.
    """

    width: int
    size: int
    is_fused: bool
    rotates: bool
    layers: tuple[tuple[str, str], ...]


def heads_of(module: Any, arguments: tuple[str, ...]) -> Heads:
    """Returns the heads of an attention."""
    cls = in_place.original_class(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if HIDDEN not in arguments:
        raise NotPlainError(f"a {cls.__name__} has no argument {HIDDEN}, but {joined(list(arguments))}")
    size = getattr(module, "head_dim", None)
    if not isinstance(size, int):
        raise NotPlainError(f"a {cls.__name__} doesn't tell the size of a head by an attribute head_dim")
    if name in _KNOWN and _FUSED in module._modules:
        return _fused(module, size)
    heads = _separate(module, size, POSITIONS in arguments)
    share = (getattr(getattr(module, "config", None), "rope_parameters", None) or {}).get("partial_rotary_factor", 1)
    if heads.rotates and share != 1:
        raise NotPlainError(_of_part(share))
    if name not in _KNOWN:
        _compare(module, heads, {MASK: None} if MASK in arguments else {})
    return heads


def _fused(module: Any, size: int) -> Heads:
    width = module.embed_dim
    if module.is_cross_attention:
        raise NotPlainError("it is an attention to another sequence, whose queries are computed apart")
    # PEFT doesn't apply the output layer there
    return Heads(width, size, True, False, (("q", _FUSED), ("k", _FUSED), ("v", _FUSED)))


def _separate(module: nn.Module, size: int, rotates: bool) -> Heads:
    output = next((name for name in _OUTPUTS if name in module._modules), _OUTPUTS[0])
    names = (*_SEPARATE, output)
    layers = [layer for name in names if (layer := module._modules.get(name)) is not None and declares_features(layer)]
    if len(layers) < len(names):
        lacking = [name for name in names if module._modules.get(name) not in layers]
        raise NotPlainError(f"it has no layers {joined(lacking)}, which would compute its queries, keys and values")
    (width, of_query), of_key, of_value, of_output = map(declared_features, layers)
    groups = of_query // max(of_key[1], 1)
    if (
        {of_key[0], of_value[0]} != {width}
        or of_key[1] != of_value[1]
        or groups * of_key[1] != of_query
        or of_key[1] % size
        or of_output[0] != of_query
    ):
        raise NotPlainError(f"the sizes of its layers aren't those of queries, keys and values in heads of {size}")
    if getattr(layers[-1], "bias", None) is not None:
        raise NotPlainError(
            f"its {output} adds a bias, which what is read from learned tokens would get, too, as in PEFT, so that a "
            "new adapter wouldn't leave the model as it is"
        )
    return Heads(width, size, False, rotates, tuple(zip("qkvo", names, strict=True)))


# computing


def split(x: Tensor, size: int, part: int | None) -> Tensor:
    """Returns values in heads, (batch, heads, length, head size).

    Args:
        x: The values, (batch, length, features).
        size: The size of a head.
        part: Which third of the features is meant; None for all.
    """
    own = x if part is None else x.chunk(3, dim=-1)[part]
    return own.unflatten(-1, (-1, size)).transpose(1, 2)


def rotated(x: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
    """Returns values in heads, rotated by position.

    Args:
        x: The values, (batch, heads, length, head size).
        positions: The cosines and sines, (batch, length, head size) each; None returns the values.
    """
    if positions is None:
        return x
    if positions[0].shape[-1] != x.shape[-1]:
        raise ValueError(f"{_of_part(positions[0].shape[-1] / x.shape[-1])}; take LoRA")
    cos, sin = (each.unsqueeze(1) for each in positions)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _of_part(share: float) -> str:
    return f"its model rotates {share:.0%} of each head by position, and adaption prompts are for those that rotate all"


# comparing

_LENGTH = 3


@torch.no_grad()
def _compare(module: nn.Module, heads: Heads, others: Mapping[str, Any]) -> None:
    """Raises NotPlainError unless an attention's own forward returns what its layers make of random numbers."""
    parameters = [each for each in module.parameters() if each.is_floating_point()]
    if not parameters or any(each.is_meta for each in parameters):
        raise NotPlainError(
            "its weights have no values, by which it would be seen that it computes as its layers tell; load them first"
        )
    device, dtype = parameters[0].device, parameters[0].dtype
    generator = torch.Generator().manual_seed(0)
    hidden, angles = (torch.randn(1, _LENGTH, size, generator=generator) for size in (heads.width, heads.size // 2))
    angles = torch.cat((angles, angles), dim=-1).to(device)
    positions = (angles.cos().to(dtype), angles.sin().to(dtype)) if heads.rotates else None
    layers: dict[str, Any] = {kind: module._modules[name] for kind, name in heads.layers}
    try:
        with in_mode(module, training=False), torch.autocast(device.type, enabled=False):
            hidden = _as_large_as_tells(hidden.to(device, dtype), positions, layers, heads)
            expected = _plain(hidden, positions, layers, heads)
            given = {HIDDEN: hidden} | ({POSITIONS: positions} if heads.rotates else {})
            found: Any = in_place.original_class(module).forward(module, **given, **others)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        # a user's code may raise any error
        raise NotPlainError(f"its forward can't be tried on hidden states alone: {_first_line(error)}") from error
    found = found[0] if isinstance(found, tuple | list) else found
    # the last token reads all, whether or not the attention is causal
    if not isinstance(found, Tensor) or found.shape != expected.shape or not _is_close(found[:, -1], expected[:, -1]):
        raise NotPlainError(
            f"a {in_place.original_class(module).__name__} computes something else than its layers "
            f"{joined([name for _, name in heads.layers])} tell, such as norms, another rotation or another scale"
        )


def _as_large_as_tells(hidden: Tensor, positions: Any, layers: dict[str, Any], heads: Heads) -> Tensor:
    """Returns hidden states for which the scores of tokens differ, so that the result depends on the queries."""
    scores = _scores(hidden, positions, layers, heads)
    return hidden * (1.5 / scores.float().std().clamp(min=1e-4)).sqrt().to(hidden.dtype)


def _scores(hidden: Tensor, positions: Any, layers: dict[str, Any], heads: Heads) -> Tensor:
    query, key = (rotated(split(layers[kind](hidden), heads.size, None), positions) for kind in "qk")
    return query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT / heads.size**0.5


def _plain(hidden: Tensor, positions: Any, layers: dict[str, Any], heads: Heads) -> Tensor:
    scores = _scores(hidden, positions, layers, heads)
    value = split(layers["v"](hidden), heads.size, None)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(hidden.dtype)
    read = weights @ value.repeat_interleave(scores.shape[1] // value.shape[1], dim=1)
    return layers["o"](read.transpose(1, 2).flatten(2))


def _is_close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-3 if found.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
