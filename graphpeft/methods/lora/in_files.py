"""LoRA's config as PEFT's files have it, and an adapter that took a product from the weights as plain LoRA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphpeft.methods.lora import merge_aware
from graphpeft.methods.lora.factors import alpha_of, exact_patterns, rank_of
from graphpeft.methods.lora.nested import drop_unused
from graphpeft.methods.lora.parts import as_stock, of_parts, wanted_parts
from graphpeft.peft_errors import PeftWarning
from graphpeft.sites.site import Site
from graphpeft.targeting import pattern_values
from graphpeft.targeting.targets import own_parameter_entry


def written(own: Any, sites: Sequence[Any]) -> Any:
    """Returns the config as PEFT reads it: weights that are no layer's are its `target_parameters`."""
    config = copy.deepcopy(own)
    config.merged_quantiser = merge_aware.in_file(own.merged_quantiser)
    drop_unused(config)
    config.rank_pattern, config.alpha_pattern = exact_patterns(sites, own)
    for site in sites:
        if isinstance(site, Site) and site.parts:
            key = pattern_values.pattern_of(site.name)
            rank, alpha = rank_of(site, own), alpha_of(site, own)
            stock = as_stock(len(site.parts), rank, alpha, own.use_rslora)
            config.rank_pattern[key], config.alpha_pattern[key] = stock
    layers = [site for site in sites if site.is_layer]
    config.fan_in_fan_out = bool(layers) and all(getattr(site, "transposed", False) for site in sites)
    if len(layers) < len(sites):
        config.target_parameters = [own_parameter_entry(site.weight) for site in sites if not site.is_layer]
        config.target_modules = sorted({site.name for site in layers})  # a file's are, and options are compared
        if config.lora_dropout:
            warnings.warn(
                f"lora_dropout={config.lora_dropout} is saved as 0, since PEFT refuses dropout beside parameters; "
                "set it in the loaded config to train further",
                PeftWarning,
                stacklevel=5,
            )
            config.lora_dropout = 0.0
    return config


def read(file: Any) -> Any:
    """Returns the config as it was before `written`: the ranks of parts are their own."""
    config = copy.deepcopy(file)
    for key in file.rank_pattern.keys() & file.alpha_pattern.keys():
        name = pattern_values.name_of(key)
        parts = wanted_parts(name, file.target_parts or {}) if name is not None else None
        if parts is not None:
            stock = config.rank_pattern.pop(key), config.alpha_pattern.pop(key)
            rank, alpha = of_parts(len(parts), *stock, file.use_rslora)
            config.rank_pattern |= {key: rank} if rank != file.r else {}
            config.alpha_pattern |= {key: alpha} if alpha != file.lora_alpha else {}
    return config


def converted(own: Any, tensors: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Returns plain LoRA of twice the rank: B A − B₀ A₀ = [B, −B₀] [A; A₀], where B₀ A₀ was taken from the weight."""
    if own.use_rslora and (own.rank_pattern or own.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` doubles ranks, and with "
            "use_rslora=True beside rank_pattern or alpha_pattern no α keeps the scale; leave it None"
        )
    config = copy.deepcopy(own)
    config.init_lora_weights = True
    drop_unused(config)
    config.r, config.lora_alpha = 2 * own.r, own.lora_alpha * (2**0.5 if own.use_rslora else 2)
    config.rank_pattern = {key: 2 * rank for key, rank in own.rank_pattern.items()}
    config.alpha_pattern = {key: 2 * alpha for key, alpha in own.alpha_pattern.items()}
    changed = dict(tensors)
    for key, tensor in tensors.items():
        if key.endswith(".lora_A.weight"):
            changed[key] = torch.cat((tensor, first[key]), dim=0)
        elif key.endswith(".lora_B.weight"):
            changed[key] = torch.cat((tensor, -first[key]), dim=1)
    return config, changed
