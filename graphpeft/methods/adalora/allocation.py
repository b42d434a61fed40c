"""AdaLoRA's budget of ranks, the importance of triplets, and the penalty that keeps A and B orthogonal.

    s = |p · ∂L/∂p|        I = β₁ I + (1 − β₁) s        U = β₂ U + (1 − β₂) |s − I|        for each element p
    I U of E's element + mean(I U) of A's row + mean(I U) of B's column                   is a triplet's importance

The same numbers as PEFT's ``RankAllocator``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from graphpeft.rules.trained import SiteParameters


class Schedule(NamedTuple):
    """The budget of ranks, step by step.

    Attributes:
        first: The number of ranks of all weights together at first.
        last: The number in the end.
        begin: The last step with the first number.
        end: The first step with the last one.
    """

    first: int
    last: int
    begin: int
    end: int

    def budget(self, step: int) -> int:
        """Returns the number of ranks after a step."""
        if step <= self.begin:
            return self.first
        left = max(0.0, 1 - (step - self.begin) / (self.end - self.begin))
        return int((self.first - self.last) * left**3 + self.last)


class Importance(NamedTuple):
    """The importance of a parameter's elements, averaged over steps.

    Attributes:
        mean: I.
        spread: U.
    """

    mean: Tensor
    spread: Tensor


Averages = Mapping[tuple[str, str], Importance]
"""The importance of each parameter, by the label of its site and its name there."""


def averaged(sites: Sequence[SiteParameters], before: Averages, beta1: float, beta2: float) -> Averages:
    """Returns the averages after a step."""
    sensitivities = {
        (site.label, name): _sensitivity(site.label, name, parameter)
        for site, parameters in sites
        for name, parameter in parameters.items()
    }
    sums = [sensitivity.sum() for sensitivity in sensitivities.values()]
    # mixed precision skips a step whose gradients overflow; in averages it would stay
    if not bool(torch.stack([each.to(sums[0].device) for each in sums]).sum().isfinite()):
        return before
    return {key: _after(before.get(key), sensitivity, beta1, beta2) for key, sensitivity in sensitivities.items()}


def _sensitivity(label: str, name: str, parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError(
            f"{name} of {label} has no gradient; call update_and_allocate after backward(), before the gradients are "
            "set to zero"
        )
    return (parameter * parameter.grad).abs_()


def _after(before: Importance | None, sensitivity: Tensor, beta1: float, beta2: float) -> Importance:
    if before is None:
        before = Importance(torch.zeros_like(sensitivity), torch.zeros_like(sensitivity))
    # the model may have moved since
    mean, spread = (each.to(sensitivity.device) for each in before)
    mean = beta1 * mean + (1 - beta1) * sensitivity
    return Importance(mean, beta2 * spread + (1 - beta2) * (sensitivity - mean).abs_())


def importance(averages: Averages, label: str) -> Tensor:
    """Returns the importance of the triplets of a site; a stack of matrices has one for each rank."""
    a, e, b = (torch.mul(*averages[label, name]) for name in ("lora_A", "lora_E", "lora_B"))
    of_triplets = e.squeeze(-1) + (a.mean(-1) + b.mean(-2))
    return of_triplets if of_triplets.ndim == 1 else of_triplets.flatten(0, -2).mean(0)


def kept(scores: Mapping[str, Tensor], drops: int) -> dict[str, list[bool]]:
    """Returns which triplets of each site stay: those above the importance of as many as are dropped."""
    if drops <= 0:
        return {label: [True] * len(score) for label, score in scores.items()}
    everything = torch.cat([score.cpu() for score in scores.values()])
    if drops >= len(everything):
        return {label: [False] * len(score) for label, score in scores.items()}
    threshold = torch.kthvalue(everything, drops).values.item()
    return {label: (score > threshold).tolist() for label, score in scores.items()}


def orthogonality(sites: Sequence[SiteParameters]) -> Tensor:
    """Returns the mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ over all sites, with gradients."""
    rows = [factor for _, at in sites for factor in (at["lora_A"], at["lora_B"].mT)]
    norms = [torch.linalg.matrix_norm(_excess(factor)).reshape(-1) for factor in rows]
    return torch.cat([norm.to(norms[0].device) for norm in norms]).mean()


def _excess(factor: Tensor) -> Tensor:
    products = factor @ factor.mT
    return products - torch.eye(products.shape[-1], dtype=products.dtype, device=products.device)


def as_tensors(pattern: Mapping[str, Sequence[bool]], averages: Averages) -> dict[str, Tensor]:
    """Returns which ranks are left, and the averages, as tensors by name."""
    masks = {f"rank_pattern/{key}": torch.tensor(mask) for key, mask in pattern.items()}
    means = {f"mean/{label}/{name}": each.mean for (label, name), each in averages.items()}
    return masks | means | {f"spread/{label}/{name}": each.spread for (label, name), each in averages.items()}


def from_tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, list[bool]], Averages]:
    """Returns the ranks that are left and the averages, from the tensors of `as_tensors`."""
    parts: dict[str, dict[str, Tensor]] = {"rank_pattern": {}, "mean": {}, "spread": {}}
    for key, tensor in state.items():
        what, _, name = key.partition("/")
        parts[what][name] = tensor
    averages = {
        (label, parameter): Importance(mean, parts["spread"][name])
        for name, mean in parts["mean"].items()
        for label, _, parameter in [name.rpartition("/")]
    }
    return {key: tensor.tolist() for key, tensor in parts["rank_pattern"].items()}, averages
