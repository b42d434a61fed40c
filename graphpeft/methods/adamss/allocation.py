"""Which groups of AdaMSS are trained: fewer and fewer, by their importance.

    s = |p · ∂L/∂p|        U = β₂ U + (1 − β₂) |s − I|        I = β₁ I + (1 − β₁) s        for each element p
    mean(I U) over A + mean(I U) over B                        is a group's importance

The same numbers as PEFT's ``AdamssModel.update_and_allocate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphpeft.methods.adalora.allocation import Importance
from graphpeft.rules.trained import SiteParameters

Place = tuple[str, str]
"""A parameter: the label of its site, and its name there; or a group: the label, and its number."""

Averages = Mapping[Place, Importance]


def averaged(sites: Sequence[SiteParameters], before: Averages, beta1: float, beta2: float) -> Averages:
    """Returns the averages after a step."""
    found = {
        (site.label, name): (parameter * parameter.grad).abs()
        for site, parameters in sites
        for name, parameter in parameters.items()
        if parameter.grad is not None and parameter.requires_grad
    }
    if not found:
        raise ValueError(
            "no factor has a gradient; call update_and_allocate after backward(), before the gradients are set to zero"
        )
    # mixed precision skips a step whose gradients overflow; in averages it would stay
    if not all(bool(sensitivity.isfinite().all()) for sensitivity in found.values()):
        return before
    return {**before, **{place: _after(before.get(place), found[place], beta1, beta2) for place in found}}


def _after(before: Importance | None, sensitivity: Tensor, beta1: float, beta2: float) -> Importance:
    if before is None:
        before = Importance(torch.zeros_like(sensitivity), torch.zeros_like(sensitivity))
    # the model may have moved since
    mean, spread = (each.to(sensitivity.device) for each in before)
    spread = beta2 * spread + (1 - beta2) * (sensitivity - mean).abs()
    return Importance(beta1 * mean + (1 - beta1) * sensitivity, spread)


def unimportant(averages: Averages, target: int) -> set[Place]:
    """Returns the groups that are no longer trained, of those whose importance is known."""
    scores = {}
    for label, name in averages:
        number = name.removeprefix("adamss_A_")
        other = averages.get((label, f"adamss_B_{number}"))
        if number != name and other is not None:
            scores[label, number] = torch.mul(*averages[label, name]).mean() + torch.mul(*other).mean()
    if target >= len(scores):
        return set()
    every = torch.stack([score.cpu() for score in scores.values()])
    threshold = -torch.kthvalue(-every, target).values.item()
    found = {place for place, score in scores.items() if not float(score) > threshold}
    if len(found) == len(scores):
        raise ValueError(
            f"no group would be trained any longer: of {target}, PEFT's allocation keeps those above the least "
            "important one; set asa_target_subspaces to 2 at least"
        )
    return found


def as_tensors(resting: set[Place], averages: Averages) -> dict[str, Tensor]:
    """Returns which groups rest, and the averages, as tensors by name."""
    state = {f"rests/{label}/{number}": torch.tensor(True) for label, number in sorted(resting)}
    for (label, name), (mean, spread) in averages.items():
        state |= {f"mean/{label}/{name}": mean, f"spread/{label}/{name}": spread}
    return state


def from_tensors(state: Mapping[str, Tensor]) -> tuple[set[Place], Averages]:
    """Returns the subspaces that rest and the averages, from the tensors of `as_tensors`."""
    resting, averages = set(), {}
    for key, tensor in state.items():
        what, _, place = key.partition("/")
        label, _, name = place.rpartition("/")
        if what == "rests":
            resting.add((label, name))
        elif what == "mean":
            averages[label, name] = Importance(tensor, state[f"spread/{place}"])
    return resting, averages
