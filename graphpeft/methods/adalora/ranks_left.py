"""The ranks of AdaLoRA's weights that are left: what `rank_pattern` says of them, and what a step leaves of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphpeft.methods.adalora import allocation
from graphpeft.rules.trained import SiteParameters


def places(config: Any, label: str) -> tuple[int, ...]:
    """Returns the places of a site's ranks that are left, among those with which training began."""
    pattern = (config.rank_pattern or {}).get(f"{label}.lora_E", [True] * config.init_r)
    return tuple(place for place, is_left in enumerate(pattern) if is_left)


def mask(config: Any, label: str) -> Tensor:
    """Returns which of the ranks that a site has are left, (ranks,); those that a file lacks it hasn't at all."""
    left = places(config, label)
    return torch.tensor([place in left for place in config.places_at(label)], dtype=torch.bool)


def after_step(
    config: Any, averages: allocation.Averages, step: int, end: int, sites: Sequence[SiteParameters]
) -> dict[str, list[bool]]:
    """Returns the `rank_pattern` after a step at which ranks are dropped: the most important ones of all weights."""
    if not averages:
        raise ValueError(
            f"no importance is known at step {step}, at which ranks are dropped; call update_and_allocate after each "
            "step"
        )
    count = len(sites)
    schedule = allocation.Schedule(config.init_r * count, config.target_r * count, config.tinit, end)
    scores = {site.label: allocation.importance(averages, site.label) for site, _ in sites}
    kept = allocation.kept(scores, sum(map(len, scores.values())) - schedule.budget(step))
    left = {label: set(itertools.compress(config.places_at(label), mask)) for label, mask in kept.items()}
    return {f"{label}.lora_E": [rank in places for rank in range(config.init_r)] for label, places in left.items()}
