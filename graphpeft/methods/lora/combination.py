"""One LoRA adapter out of several.

    linear      A = Σ ± √|wᵢsᵢ| Aᵢ    B = Σ √|wᵢsᵢ| Bᵢ
    cat         A = [w₁s₁A₁; w₂s₂A₂; …]    B = [B₁, B₂, …]                 exactly Σ wᵢ ΔWᵢ
    svd         B A = the best approximation of Σ wᵢ ΔWᵢ of the new rank

The scale of the new adapter is 1; where a site doubles all scales, sᵢ is without that. Kinds with `ties`, `dare` or
`magnitude_prune` in their names leave elements out before the sum: of the factors themselves, or of ΔW where the name
ends in `_svd`. The magnitudes of DoRA aren't combined: the new adapter keeps those with which it starts, as in PEFT.
Rows of `trainable_token_indices` get Σ wᵢ times their changes, of each kind; PEFT's have the base's values.
Sources: Yadav et al., "TIES-Merging", arXiv 2306.01708; Yu et al., "Language Models are Super Mario" (DARE), arXiv
2311.03099; the same numbers as PEFT's ``add_weighted_adapter`` and ``utils/merge_utils.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from graphpeft.graph.autocast import HALVES
from graphpeft.methods.lora.combined_config import SUMS, kind_of
from graphpeft.methods.lora.convolution import LoraConvolution
from graphpeft.methods.lora.dora import Dora
from graphpeft.methods.lora.merge_aware import Rounded, RoundedLeaf
from graphpeft.methods.lora.rule import Combines
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.combination import Combination, Part
from graphpeft.rules.parameter_spec import RankAxis


def combine(target: AdaptedSite, parts: Sequence[Part], how: Combination, count: int) -> dict[str, Tensor]:
    """Returns A and B of the combined adapter at one site; its magnitudes, if it has some, keep their first values."""
    target, parts = _in_direction(target), [_part_in_direction(part) for part in parts]
    for part in parts:
        if part.tensors.keys() != {"lora_A", "lora_B"} or not isinstance(target.rule, Combines):
            raise ValueError(
                f"{target.site.name} has factors of parts, or other ones than A and B, which can't be combined yet"
            )
        if isinstance(part.adapted.rule, LoraConvolution) != isinstance(target.rule, LoraConvolution):
            raise ValueError(
                f"{target.site.name} has features in groups, which divide only one of the ranks of the adapters and of "
                "their combination: LoRA's factors are others there; choose a combination_type and ranks alike"
            )
    kind = kind_of(how, count)
    if kind == "cat":
        A, B = _concatenated(target, parts)
    elif kind in SUMS:
        A, B = _summed(kind, target, parts, how)
    else:
        A, B = _decomposed(kind, target, parts, how)
    return {"lora_A": padded(target, "lora_A", A), "lora_B": padded(target, "lora_B", B)}


def _in_direction(adapted: AdaptedSite) -> AdaptedSite:
    """Returns a site of DoRA, or of rounded sums, as one of LoRA alone."""
    return adapted._replace(rule=adapted.rule.direction) if isinstance(adapted.rule, _AROUND) else adapted


_AROUND = (Dora, Rounded, RoundedLeaf)
"""The rules that have LoRA's as their `direction`."""


def _part_in_direction(part: Part) -> Part:
    if not isinstance(part.adapted.rule, _AROUND):
        return part
    adapted = _in_direction(part.adapted)
    factors = {name: tensor for name, tensor in part.tensors.items() if name != "lora_magnitude"}
    change = functools.partial(adapted.rule.delta, **factors, lora_scaling=part.constants["lora_scaling"])
    return part._replace(adapted=adapted, tensors=factors, delta=change)


def _summed(kind: str, target: AdaptedSite, parts: Sequence[Part], how: Combination) -> tuple[Tensor, Tensor]:
    scales = _scales(target, parts)
    roots = torch.tensor([math.sqrt(abs(scale)) for scale in scales])
    signs = torch.tensor([1.0 if scale >= 0 else -1.0 for scale in scales])
    shapes = [tuple(part.tensors["lora_A"].shape) for part in parts]
    if len(set(shapes)) > 1:
        raise ValueError(f"{parts[0].adapted.site.name} has A of the shapes {shapes}; choose 'cat' or 'svd'")
    # a sign on one of the factors alone, or it would be lost
    A = _arithmetic(kind, [part.tensors["lora_A"] for part in parts], roots * signs, how)
    return A, _arithmetic(kind, [part.tensors["lora_B"] for part in parts], roots, how)


def _concatenated(target: AdaptedSite, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    ranks = _rank(target, "lora_A")
    groups, a_axis, b_axis = ranks.blocks, ranks.axis, _rank(target, "lora_B").axis
    scaled = [part.tensors["lora_A"] * scale for part, scale in zip(parts, _scales(target, parts), strict=True)]
    # B's groups use A's features group by group, so the ranks are put together within each
    grouped = [tensor.unflatten(a_axis, (groups, -1)) for tensor in scaled]
    A = torch.cat(grouped, a_axis + 1).flatten(a_axis, a_axis + 1)
    return A, torch.cat([part.tensors["lora_B"] for part in parts], b_axis)


def _decomposed(kind: str, target: AdaptedSite, parts: Sequence[Part], how: Combination) -> tuple[Tensor, Tensor]:
    reason = target.unmergeable
    if reason is not None:
        raise ValueError(f"the change of {target.site.name} can't be decomposed: {reason}; choose 'linear' or 'cat'")
    weights = torch.tensor([part.weight / target.constants["lora_scaling"] for part in parts])
    change = _arithmetic(kind.removesuffix("_svd"), [part.delta() for part in parts], weights, how)
    product = target.rule.as_product(change)
    if product.dtype in HALVES:  # PyTorch decomposes no matrix of half precision
        product = product.float()
    U, S, V = torch.linalg.svd(product, full_matrices=how.svd_full_matrices, driver=how.svd_driver)
    specs = target.specs
    ranks = _rank(target, "lora_B")
    rank = min(specs["lora_B"].shape[ranks.axis] // ranks.blocks, S.shape[-1])
    U, V = U[..., :rank] * S[..., None, :rank], V[..., :rank, :]
    if how.svd_clamp is not None:
        most = torch.quantile(torch.cat([U.flatten(), V.flatten()]), how.svd_clamp)
        U, V = U.clamp(-most, most), V.clamp(-most, most)
    return as_factors(target, U, V)


def as_factors(target: AdaptedSite, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A and B in the shapes that a site's rule has for them, from matrices whose product its change is.

    Args:
        target: The site with LoRA's rule.
        B: The left matrix, of shape (rows of the product, rank), or a stack of such.
        A: The right one, of shape (rank, columns of the product), likewise.
    """
    specs, a_axis, rank = target.specs, _rank(target, "lora_A").axis, A.shape[-2]
    if A.dim() == 3:
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    others = [size for axis, size in enumerate(specs["lora_A"].shape) if axis != a_axis]
    return A.reshape(rank, *others).movedim(0, a_axis), B.reshape(-1, rank, *specs["lora_B"].shape[2:])


def _scales(target: AdaptedSite, parts: Sequence[Part]) -> list[float]:
    """Returns the factor of each part's product, as a part of the factor that the new one gets."""
    return [part.weight * part.constants["lora_scaling"] / target.constants["lora_scaling"] for part in parts]


def _rank(target: AdaptedSite, name: str) -> RankAxis:
    axis = target.specs[name].rank
    assert axis is not None
    return axis


def padded(target: AdaptedSite, name: str, tensor: Tensor) -> Tensor:
    """Returns a factor with zeros up to the rank of the new adapter, where a pattern gave the site a lower one."""
    shape, rank = target.specs[name].shape, _rank(target, name)
    return tensor.contiguous() if tensor.shape == shape else rank.resized(tensor, shape)


# sums


def _arithmetic(kind: str, tensors: list[Tensor], weights: Tensor, how: Combination) -> Tensor:
    """Returns the weighted sum of tensors, without the elements that `kind` leaves out."""
    if kind.startswith("dare") or kind in ("ties", "magnitude_prune"):
        prune = _randomly_pruned if kind.startswith("dare") else _pruned
        assert how.density is not None
        tensors = [prune(tensor, how.density) for tensor in tensors] if how.density < 1 else tensors
    stacked = torch.stack(tensors)
    weighted = stacked * weights.to(stacked.device).view(-1, *(1 for _ in stacked.shape[1:]))
    if not kind.endswith("ties"):
        return weighted.sum(0).to(stacked.dtype)
    agrees = _agrees_with_majority(stacked, how.majority_sign_method)
    mean = (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1.0)
    return mean.to(stacked.dtype)


def _pruned(tensor: Tensor, density: float) -> Tensor:
    """Keeps the largest elements, the share `density` of all."""
    kept = torch.topk(tensor.abs().reshape(-1), int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[kept] = 1
    return tensor * mask.reshape(tensor.shape)


def _randomly_pruned(tensor: Tensor, density: float) -> Tensor:
    """Keeps each element with the probability `density`, and divides the kept ones by it."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _agrees_with_majority(stacked: Tensor, method: str) -> Tensor:
    """Returns for each element whether it has the majority's sign at its place, by sum or by number."""
    signs = stacked.sign()
    balance = stacked.sum(0) if method == "total" else signs.sum(0)
    return signs == torch.where(balance >= 0, 1, -1)
