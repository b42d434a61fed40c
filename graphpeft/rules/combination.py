"""What is asked of a method that combines several of its adapters into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from graphpeft.rules.adapted_site import AdaptedSite


class Combination(NamedTuple):
    """How adapters are combined, by PEFT's names.

    Attributes:
        kind: What PEFT calls `combination_type`.
        svd_rank: The rank of the new adapter, for kinds that decompose; the highest of the adapters' if None.
        svd_clamp: The quantile at which the factors are cut off, for those kinds.
        svd_full_matrices: Whether all singular vectors are computed.
        svd_driver: The method of cuSOLVER.
        density: The share of elements that is kept, for kinds that leave some out.
        majority_sign_method: By what the sign of an element is elected: "total" or "frequency".
    """

    kind: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"


class Part(NamedTuple):
    """What one of the combined adapters has at a site.

    Attributes:
        adapted: The site with the adapter's rule.
        weight: The adapter's weight.
        tensors: Its tensors there, by the rule's names.
        constants: Its constants there, likewise.
        delta: Returns its change of the weight.
    """

    adapted: AdaptedSite
    weight: float
    tensors: Mapping[str, torch.Tensor]
    constants: Mapping[str, float]
    delta: Callable[[], torch.Tensor]
