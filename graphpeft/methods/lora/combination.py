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

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphpeft.methods.lora.convolution import LoraConvolution
from graphpeft.methods.lora.dora import Dora
from graphpeft.methods.lora.merge_aware import Rounded, RoundedLeaf
from graphpeft.methods.lora.variants.kinds import variant_of
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.combination import Combination, Part
from graphpeft.rules.parameter_spec import RankAxis
from graphpeft.rules.rule import Combines
from graphpeft.sites.site import Site

SUMS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""The kinds that combine the factors element by element, whose ranks must be equal."""

DECOMPOSITIONS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""The kinds that combine the changes of weights, and take the result apart again."""

KINDS = (*SUMS, "cat", *DECOMPOSITIONS)


def combined_config(configs: Sequence[Any], sites: Sequence[Site], how: Combination) -> Any:
    """Returns the config of the combined adapter.

    Args:
        configs: The configs of the adapters.
        sites: The sites of all of them together.
        how: How they are combined.

    Raises:
        ValueError: If they can't be combined so.
    """
    _check(how)
    variant = next((found for found in map(variant_of, configs) if found is not None), None)
    if variant is not None:
        raise ValueError(f"{variant.name} is more than a product of A and B, and can't be combined")
    if any(config.target_parts for config in configs):
        raise ValueError("target_parts has factors for each part, which can't be combined yet")
    if any(config.use_dora for config in configs):
        lengths = "those of the weights" if configs[0].use_dora else "none, as the first of them"
        warnings.warn(
            f"of adapters with use_dora=True, A and B are combined, and not the lengths, as in PEFT: the new one has "
            f"{lengths}",
            PeftWarning,
            stacklevel=4,
        )
    if any(config.merged_quantiser != configs[0].merged_quantiser for config in configs):
        raise ValueError("merged_quantiser isn't the same in all of them; combine those that agree in it")
    if len({config.ensure_weight_tying for config in configs}) > 1:
        raise ValueError("ensure_weight_tying is set for some of them alone; combine those that agree in it")
    # the highest rank that a config gives, which no site of the new adapter exceeds
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
    if _kind(how, len(configs)) in SUMS and len(set(ranks)) > 1:
        raise ValueError(
            f"combination_type={how.kind!r} adds up factors of equal ranks, and these have the ranks {ranks}; choose "
            "'cat' or 'svd'"
        )
    rank = sum(ranks) if how.kind == "cat" else max(ranks)
    if how.kind in DECOMPOSITIONS and how.svd_rank:
        rank = how.svd_rank
    config = dataclasses.replace(
        configs[0], r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, use_rslora=False
    )
    if config.init_lora_weights not in (True, False, "gaussian"):
        config.init_lora_weights = True  # others may change the base weights, and its values come from elsewhere
        config.drop_unused()
    config.modules_to_save = _all_names([each.modules_to_save for each in configs])
    config.trainable_token_indices = _all_rows([each.trainable_token_indices for each in configs])
    targets = [{name: getattr(each, name) for name in _TARGETING} for each in configs]
    if any(others != targets[0] for others in targets):
        for name in _TARGETING:
            setattr(config, name, None)
        config.target_modules = {site.name for site in sites if site.is_layer}
        config.target_parameters = [site.weight for site in sites if not site.is_layer] or None
    return config


_TARGETING = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")


def _all_names(named: Sequence[Any]) -> list[str] | None:
    """Returns the value of `modules_to_save` that names what any of these values names."""
    return list(dict.fromkeys(name for names in named for name in names or ())) or None


def _all_rows(named: Sequence[Any]) -> Any:
    """Returns the value of `trainable_token_indices` that names the rows of all of these values."""
    given = [rows for rows in named if rows]
    if not given:
        return None
    if not any(isinstance(rows, Mapping) for rows in given):
        return sorted({row for rows in given for row in rows})
    if not all(isinstance(rows, Mapping) for rows in given):
        raise ValueError(
            "trainable_token_indices names the embedding in some of them alone; give all a dict with its name"
        )
    paths = dict.fromkeys(path for rows in given for path in rows)
    return {path: sorted({row for rows in given for row in rows.get(path, ())}) for path in paths}


def _check(how: Combination) -> None:
    if how.kind not in KINDS:
        raise ValueError(f"combination_type is {how.kind!r}; choose one of {list(KINDS)}")
    if how.majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method is {how.majority_sign_method!r}; choose 'total' or 'frequency'")
    if _prunes(how.kind) and (how.density is None or not 0 < how.density <= 1):
        raise ValueError(
            f"combination_type={how.kind!r} keeps a share of the elements, the density: 0 < density ≤ 1, not "
            f"{how.density}"
        )
    if how.svd_rank is not None and how.svd_rank <= 0:
        raise ValueError(f"svd_rank must be a positive integer, not {how.svd_rank!r}")
    if how.svd_clamp is not None and not 0 <= how.svd_clamp <= 1:
        raise ValueError(f"svd_clamp is a quantile: 0 ≤ q ≤ 1, not {how.svd_clamp!r}")


def _prunes(kind: str) -> bool:
    return kind not in ("linear", "cat", "svd")


def _kind(how: Combination, count: int) -> str:
    """Returns the kind, which for a single adapter is always linear, as in PEFT."""
    return "linear" if count == 1 else how.kind


def combine(target: AdaptedSite, parts: Sequence[Part], how: Combination, count: int) -> dict[str, Tensor]:
    """Returns A and B of the combined adapter at one site; its magnitudes, if it has some, keep their first values.

    Args:
        target: The site with the new rule.
        parts: The tensors and constants of each adapter that adapts the site.
        how: How they are combined.
        count: The number of adapters altogether.

    Raises:
        ValueError: If they can't be combined.
    """
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
    kind = _kind(how, count)
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
