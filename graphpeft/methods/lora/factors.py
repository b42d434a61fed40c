"""The rank and the scale of a site, and the first values of the factors A and B."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graphpeft import ops, targets
from graphpeft.sites import LeafSite, Site


def rank_of(site: Site | LeafSite, config: Any) -> int:
    """Returns the rank of A and B at `site`."""
    return targets.pattern_value(config.rank_pattern, site.name, config.r)


def scaling_of(site: Site | LeafSite, config: Any) -> float:
    """Returns α/r, or α/√r with rank-stabilised LoRA."""
    rank = rank_of(site, config)
    alpha = targets.pattern_value(config.alpha_pattern, site.name, config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    # what a module's name stands for beside its own weights: an attention's output projection
    is_inside = site.named is not None and site.owner != site.named
    return TIMES_INSIDE * scaling if is_inside else scaling


TIMES_INSIDE = 2
"""How often PEFT 0.21.2 adds the change of ``nn.MultiheadAttention``'s output projection, in its outputs and in what it
merges: its ``MultiheadAttention.merge`` adds it and has ``out_proj.merge`` add it again (its pull request 3774). Files
have to mean the same here and there."""


def constants_of(site: Site | LeafSite, config: Any, drops: bool = False) -> Mapping[str, float]:
    """Returns the numbers that a branch reads: the scale, and the probability of dropout if there is one."""
    return {"lora_scaling": scaling_of(site, config)} | ({"lora_dropout": config.lora_dropout} if drops else {})


def initialise(parameters: Mapping[str, Tensor], site: Site | LeafSite, config: Any) -> None:
    """Draws A and B as PEFT does, so that equal seeds give equal values.

    Args:
        parameters: `lora_A`, the factor that is applied first, and `lora_B`; filled in place.
        site: Their site.
        config: The config.
    """
    A, B, kind = parameters["lora_A"], parameters["lora_B"], config.init_lora_weights
    # PEFT builds two layers first, whose own draws come before its own: they are drawn here too
    draw_as_layer(A)
    draw_as_layer(B)
    if kind is False:
        return
    if kind == "gaussian":
        A.normal_(std=1 / rank_of(site, config))
    else:
        draw_as_layer(A)
    B.zero_()


def draw_as_layer(weight: Tensor) -> None:
    """Fills a weight as ``nn.Linear`` and ``nn.Conv2d`` do: uniform within ±1/√(inputs), Kaiming's bound for a = √5."""
    bound = 1 / math.sqrt(weight[0].numel())
    weight.uniform_(-bound, bound)


def refused_dropout(site: Site, config: Any) -> str | None:
    """Returns the reason why there can be no dropout, if there should be: a weight as such has no input.

    An adapter for inference has none anyway.
    """
    if site.op is not ops.Weight or not config.lora_dropout or config.inference_mode:
        return None
    use = f"the use of its {site.attribute} has none that is known"
    return f"lora_dropout={config.lora_dropout} drops elements of an operation's input, and {use}; set lora_dropout=0"
