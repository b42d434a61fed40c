"""The inputs of a method that combines several of its adapters into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from graphpeft.rules.adapted_site import AdaptedSite


class Combination(NamedTuple):
    """The options of a combination of adapters, by PEFT's names.

    Attributes:
        kind: PEFT's `combination_type`.
        svd_rank: The rank of the new adapter, for kinds with an SVD; None for the highest rank of the adapters.
        svd_clamp: The quantile at which the factors are clamped, for kinds with an SVD.
        svd_full_matrices: Whether the SVD computes all singular vectors.
        svd_driver: The cuSOLVER driver of the SVD.
        density: The fraction of elements to keep, for kinds that prune.
        majority_sign_method: How an element's sign is elected: "total" or "frequency".
    """

    kind: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"


class Part(NamedTuple):
    """One of the combined adapters at a site.

    Attributes:
        adapted: The site with the adapter's rule.
        weight: The adapter's weight in the combination.
        tensors: The adapter's tensors there, by the rule's names.
        constants: The adapter's constants there, by the rule's names.
        delta: Returns the adapter's change of the weight.
    """

    adapted: AdaptedSite
    weight: float
    tensors: Mapping[str, torch.Tensor]
    constants: Mapping[str, float]
    delta: Callable[[], torch.Tensor]
