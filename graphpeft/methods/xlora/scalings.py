"""The scalings of X-LoRA: how much of each expert a token gets at each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INPUT = "xlora_scalings"
"""The argument of a call by which layers read the scalings."""

FIRST = "first run"
"""A key in a mapping with scalings: experts for which there are none do nothing in a run that finds out others'."""


def used(config: Any, scalings: Tensor) -> Tensor:
    """Returns what layers get of scalings: those of the best experts alone, a softmax over these, times a weight.

    Args:
        config: The config.
        scalings: Of shape (rows, positions, layers, experts).
    """
    if config.top_k_lora is not None:
        chosen = scalings.topk(config.top_k_lora, dim=-1).indices
        scalings = scalings * torch.zeros_like(scalings).scatter(-1, chosen, 1)
    if config.enable_softmax_topk:
        is_out = scalings == 0
        scalings = scalings.masked_fill(is_out, float("-inf")).softmax(dim=-1).masked_fill(is_out, 0)
    return scalings * config.global_scaling_weight


class Log:
    """The scalings of a model's calls; a copy of a model begins its own."""

    def __init__(self) -> None:
        self.latest: Tensor | None = None
        self.every: list[Tensor] = []
        self.is_on = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Log:
        return Log()

    def __reduce__(self) -> tuple[Any, ...]:
        return Log, ()

    def note(self, scalings: Tensor) -> None:
        """Notes the scalings of a call."""
        self.latest = scalings
        if self.is_on:
            self.every.append(scalings)

    def by_length(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Returns the logged scalings, each with its place in the log, by their number of positions."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for place, scalings in enumerate(self.every):
            places, tensors = found.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            tensors.append(scalings)
        return found


def shares_at(value: Tensor, given: Any, key: int, layer: int, is_flat: bool) -> Tensor | None:
    """Returns the scalings of a layer for each token, (…, experts); None if its experts do nothing in this run.

    Args:
        value: The layer's output for its tokens, (rows, positions, features).
        given: The scalings of the call: a tensor, (rows, positions, layers, experts), or a mapping with such.
        key: The adapter's key in the mapping.
        layer: The layer's number.
        is_flat: Whether the layer has rows and positions in one dimension.
    """
    if isinstance(given, Mapping):
        if key not in given and FIRST in given:
            return None
        if key not in given:
            raise TypeError(f"an active adapter needs {INPUT} in each call, which follow from one of the whole model")
        given = given[key]
    shares = given[:, :, layer].to(value.device)
    if is_flat and value.ndim == 2:
        shares = shares.flatten(0, 1)
    if value.shape[:-1] != shares.shape[:-1]:
        raise ValueError(
            f"X-LoRA has scalings for {tuple(shares.shape[:-1])} rows and positions, and a layer of an expert computes "
            f"{tuple(value.shape[:-1])}; train experts for layers that are given each token once, in (rows, positions, "
            "features)"
        )
    return shares
