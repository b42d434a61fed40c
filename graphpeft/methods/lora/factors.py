"""The rank and the scale of the factors A and B at a site, and their random first values."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Size, Tensor

from graphpeft.sites.site import LeafSite, Site
from graphpeft.targeting import pattern_values

T = TypeVar("T")

TIMES_INSIDE = 2
"""How often PEFT 0.21.2 adds the change of ``nn.MultiheadAttention``'s output projection, active and merged: its
``MultiheadAttention.merge`` adds it and has ``out_proj.merge`` add it again (its pull request 3774). Files have to mean
the same here and there."""


def rank_of(site: Site | LeafSite, config: Any) -> int:
    """Returns the rank of A and B at a site."""
    return _own_value(config.rank_pattern, site, config.r)


def rank_at(name: str, config: Any) -> int:
    """Returns the rank of A and B at the site of this name."""
    return pattern_values.pattern_value(config.rank_pattern, name, config.r)


def alpha_of(site: Site | LeafSite, config: Any) -> float:
    """Returns α at a site."""
    return _own_value(config.alpha_pattern, site, config.lora_alpha)


def scaling_of(site: Site | LeafSite, config: Any) -> float:
    """Returns α/r, or α/√r with rank-stabilised LoRA."""
    rank, alpha = rank_of(site, config), alpha_of(site, config)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    # a module's name can stand for a weight inside it: an attention's output projection
    is_inside = site.named is not None and site.owner != site.named
    return TIMES_INSIDE * scaling if is_inside else scaling


def scope_of_tied(site: Site, name: str) -> str | None:
    """Returns the scope of a factor at an embedding, or at a layer that has its table; None if it isn't shared."""
    return None if site.tied_to is None else f"{site.tied_to}.{name}"


def _own_value(patterns: Mapping[str, T], site: Site | LeafSite, default: T) -> T:
    """Returns a site's own value: a pattern for one call goes before a pattern for all calls."""
    if not patterns:
        return default
    of_name = pattern_values.pattern_value(patterns, site.name, default)
    return of_name if site.call is None else pattern_values.pattern_value(patterns, site.label, of_name)


def exact_patterns(sites: Sequence[Site | LeafSite], config: Any) -> tuple[dict[str, int], dict[str, float]]:
    """Returns a `rank_pattern` and an `alpha_pattern` that give these sites the same values as `config`, in any order.

    In the config's patterns, the first key that matches wins; a file may have them in another order.
    """
    ranks = {_pattern_of(site): rank_of(site, config) for site in sites}
    alphas = {_pattern_of(site): alpha_of(site, config) for site in sites}
    return (
        {key: rank for key, rank in ranks.items() if rank != config.r},
        {key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha},
    )


def _pattern_of(site: Site | LeafSite) -> str:
    return pattern_values.pattern_of(site.name if site.call is None else site.label)


def draw(parameters: Mapping[str, Tensor], kind: bool | str, rank: int) -> None:
    """Draws A and B as PEFT does, so that equal seeds give equal values."""
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
    """Draws the values of the two layers that PEFT builds first: its own draws come after theirs."""
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
    inputs = shape[1:].numel()
    return 1 / math.sqrt(inputs) if inputs else 0.0
