"""The first run of a model with X-LoRA: its hidden states tell how the second one weighs the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphpeft.methods.prompts.caches import CACHES, has_tokens
from graphpeft.methods.xlora.classifier import classified, layers_of
from graphpeft.methods.xlora.scalings import FIRST, INPUT, used
from graphpeft.rules.present_call import PresentCall

HIDDEN = "output_hidden_states"
"""The argument by which a model returns its hidden states."""

_TOKENS = ("input_ids", "inputs_embeds")


def scalings(config: Any, call: PresentCall) -> Tensor:
    """Returns the scalings of a call, (rows, positions, layers, experts)."""
    given = next((call.arguments[name] for name in _TOKENS if call.arguments.get(name) is not None), None)
    if given is None:
        raise ValueError(f"X-LoRA reads from {' or '.join(_TOKENS)} how many tokens a call has; pass one of them")
    if any(has_tokens(call.arguments.get(name)) for name in CACHES):
        raise ValueError(
            "X-LoRA's first run needs all tokens, and this call goes on from those in a cache; pass the whole "
            "sequence, and use_cache=False"
        )
    layers = layers_of(config, call.parameters_at(0))
    shape = (*given.shape[:2], len(config.layers), len(config.experts.every))
    hidden = _hidden_states(config, call, layers[0][0].new_full(shape, config.scaling_pass_value))
    logits = classified(hidden, layers, config.xlora_dropout_p, call.is_training)
    found = logits.unflatten(-1, (-1, shape[-1])).expand(shape)
    return torch.softmax(found / config.softmax_temperature, dim=-1) if config.enable_softmax else found


@torch.no_grad()
def _hidden_states(config: Any, call: PresentCall, first: Tensor) -> Tensor:
    """Returns the last hidden states of a run with these scalings."""
    # a cache that the call may have is the second run's
    others: dict[str, Any] = {name: None for name in CACHES if call.arguments.get(name) is not None}
    others |= {"use_cache": False} if call.arguments.get("use_cache") else {}
    first = used(config, first)
    found = call.run({INPUT: {config.key: first, FIRST: first}}, **{HIDDEN: True}, return_dict=True, **others)
    states = getattr(found, "hidden_states", None)
    if not states:
        raise ValueError("the model returns no hidden_states, from which X-LoRA tells how to weigh its experts")
    if states[-1].shape[-1] != config.hidden_size:
        raise ValueError(
            f"hidden_size is {config.hidden_size}, and the model's hidden states have {states[-1].shape[-1]} features; "
            "leave hidden_size out, or give that"
        )
    return states[-1]
