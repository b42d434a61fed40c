"""What the rules of LoRA share: the rank and the scale of a site, the branch's input, and random first values."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Size, Tensor

from graphpeft.graph import ops
from graphpeft.rules.rule import ParameterSpec
from graphpeft.sites.site import LeafSite, Site
from graphpeft.targeting import targets

T = TypeVar("T")


def rank_of(site: Site | LeafSite, config: Any) -> int:
    """Returns the rank of A and B at `site`."""
    return _own_value(config.rank_pattern, site, config.r)


def rank_at(name: str, config: Any) -> int:
    """Returns the rank of A and B at the site of this name."""
    return targets.pattern_value(config.rank_pattern, name, config.r)


def alpha_of(site: Site | LeafSite, config: Any) -> float:
    """Returns α at `site`."""
    return _own_value(config.alpha_pattern, site, config.lora_alpha)


def scaling_of(site: Site | LeafSite, config: Any) -> float:
    """Returns α/r, or α/√r with rank-stabilised LoRA."""
    rank, alpha = rank_of(site, config), alpha_of(site, config)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    # what a module's name stands for beside its own weights: an attention's output projection
    is_inside = site.named is not None and site.owner != site.named
    return TIMES_INSIDE * scaling if is_inside else scaling


def _own_value(patterns: Mapping[str, T], site: Site | LeafSite, default: T) -> T:
    """Returns a site's own value: one call's goes before that of all calls."""
    if not patterns:
        return default
    of_name = targets.pattern_value(patterns, site.name, default)
    return of_name if site.call is None else targets.pattern_value(patterns, site.label, of_name)


def exact_patterns(sites: Sequence[Site | LeafSite], config: Any) -> tuple[dict[str, int], dict[str, float]]:
    """Returns a `rank_pattern` and an `alpha_pattern` that give these sites what `config` gives them, in any order.

    In those of the config, the first key that matches wins; a file may have them in another order.
    """
    ranks = {_pattern_of(site): rank_of(site, config) for site in sites}
    alphas = {_pattern_of(site): alpha_of(site, config) for site in sites}
    return (
        {key: rank for key, rank in ranks.items() if rank != config.r},
        {key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha},
    )


def _pattern_of(site: Site | LeafSite) -> str:
    return targets.pattern_of(site.name if site.call is None else site.label)


TIMES_INSIDE = 2
"""How often PEFT 0.21.2 adds the change of ``nn.MultiheadAttention``'s output projection, in its outputs and in what it
merges: its ``MultiheadAttention.merge`` adds it and has ``out_proj.merge`` add it again (its pull request 3774). Files
have to mean the same here and there."""


def constants_of(site: Site | LeafSite, config: Any, drops: bool = False) -> Mapping[str, float]:
    """Returns the numbers that a branch reads: the scale, and the probability of dropout if there is one."""
    return {"lora_scaling": scaling_of(site, config)} | ({"lora_dropout": config.lora_dropout} if drops else {})


def input_of(x: Any, lora_A: Any, lora_dropout: Any, training: Any, drops: bool, casts: bool) -> Any:
    """Returns what a branch is given: the operation's input in the dtype of A, after dropout if there is one."""
    h = x.to(lora_A.dtype) if casts else x
    return F.dropout(h, lora_dropout, training) if drops else h


def bias_parameter(features: int) -> Mapping[str, ParameterSpec]:
    """Returns the bias of B, for `lora_bias`."""
    return {"lora_bias": ParameterSpec((features,), key="lora_B.bias")}


def bias_change(lora_bias: Any, lora_scaling: Any) -> Any:
    """Returns the change of a bias, or None without the bias of B."""
    return lora_bias * lora_scaling if lora_bias is not None else None


def unmergeable_bias(site: Site, has_bias: bool) -> str | None:
    """Returns the reason why the bias of B can't be merged, if there is one."""
    if not has_bias or site.bias is not None:
        return None
    return "it has no bias of its own, into which that of lora_bias could go"


def refused_bias(site: Site, config: Any) -> str | None:
    """Returns the reason why there can be no bias of B, if there should be: it is a layer's in PEFT's files."""
    if not config.lora_bias or (site.is_layer and site.layout is site.op and site.layout is not ops.Embedding):
        return None
    return "lora_bias=True is for the outputs of linear layers and convolutions, which this is none of"


def refused_unless_plain(config: Any, what: str) -> str | None:
    """Returns the reason why there can be no LoRA but the plain one, if there should be another."""
    options = {"use_dora": False, "lora_bias": False}
    for name, only in options.items():
        if getattr(config, name) != only:
            return f"{name}={getattr(config, name)!r} is for layers, and it is {what}"
    if config.init_lora_weights not in (True, False, "gaussian"):
        return f"init_lora_weights={config.init_lora_weights!r} is for layers, and it is {what}"
    return None


def refused_inside(site: Site, config: Any) -> str | None:
    """Returns the reason why there can be no LoRA but the plain one at a weight of several that a name stands for."""
    return refused_unless_plain(config, "one of several weights of a module") if site.named is not None else None


def draw(parameters: Mapping[str, Tensor], kind: bool | str, rank: int) -> None:
    """Draws A and B as PEFT does, so that equal seeds give equal values.

    Args:
        parameters: `lora_A`, the factor that is applied first, `lora_B`, and `lora_bias` if there is one; filled in
            place.
        kind: The config's `init_lora_weights`: True, False or "gaussian".
        rank: The rank.
    """
    draw_as_layers(parameters)
    if kind is False:
        return
    A, B = parameters["lora_A"], parameters["lora_B"]
    if kind == "gaussian":
        A.normal_(std=1 / rank)
    else:
        draw_as_layer(A)
    B.zero_()
    if "lora_bias" in parameters:
        parameters["lora_bias"].zero_()


def draw_as_layers(parameters: Mapping[str, Tensor]) -> None:
    """Draws what the two layers draw that PEFT builds first: its own draws come after theirs."""
    A, B = parameters["lora_A"], parameters["lora_B"]
    draw_as_layer(A)
    draw_as_layer(B)
    if "lora_bias" in parameters:
        bound = _bound(B.shape)
        parameters["lora_bias"].uniform_(-bound, bound)


def draw_as_layer(weight: Tensor) -> None:
    """Fills a weight as ``nn.Linear`` and ``nn.Conv2d`` do: uniform within ±1/√(inputs), Kaiming's bound for a = √5."""
    bound = _bound(weight.shape)
    weight.uniform_(-bound, bound)


@functools.lru_cache(maxsize=256)
def _bound(shape: Size) -> float:
    return 1 / math.sqrt(shape[1:].numel())


def refused_dropout(site: Site, config: Any) -> str | None:
    """Returns the reason why there can be no dropout, if there should be: a weight as such has no input.

    An adapter for inference has none anyway.
    """
    if site.op is not ops.Weight or not config.lora_dropout or config.inference_mode:
        return None
    use = f"the use of its {site.attribute} has none that is known"
    return f"lora_dropout={config.lora_dropout} drops elements of an operation's input, and {use}; set lora_dropout=0"
