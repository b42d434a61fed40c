"""The config of one LoRA adapter out of several: its rank, its targets, and what it trains fully."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from graphpeft.methods.lora.nested import drop_unused
from graphpeft.methods.lora.variants.kinds import variant_of
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.combination import Combination
from graphpeft.sites.site import Site
from graphpeft.targeting.targets import own_parameter_entry

SUMS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""The kinds that combine the factors element by element, whose ranks must be equal."""

DECOMPOSITIONS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""The kinds that combine the changes of weights, and take the result apart again."""

KINDS = (*SUMS, "cat", *DECOMPOSITIONS)


def combined_config(configs: Sequence[Any], sites: Sequence[Site], how: Combination) -> Any:
    """Returns the config of the combined adapter."""
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
    if kind_of(how, len(configs)) in SUMS and len(set(ranks)) > 1:
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
        drop_unused(config)
    config.modules_to_save = _all_names([each.modules_to_save for each in configs])
    config.trainable_token_indices = _all_rows([each.trainable_token_indices for each in configs])
    targets = [{name: getattr(each, name) for name in _TARGETING} for each in configs]
    if any(others != targets[0] for others in targets):
        for name in _TARGETING:
            setattr(config, name, None)
        config.target_modules = {site.name for site in sites if site.is_layer}
        config.target_parameters = [own_parameter_entry(site.weight) for site in sites if not site.is_layer] or None
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


def kind_of(how: Combination, count: int) -> str:
    """Returns the kind of a combination, which for a single adapter is always linear, as in PEFT."""
    return "linear" if count == 1 else how.kind
