"""Which of LoRA's rules adapts which kind of site."""

from __future__ import annotations

from typing import Any

import torch

from graphpeft.graph import ops
from graphpeft.graph.ops.boundaries import Leaf
from graphpeft.methods.lora import merge_aware
from graphpeft.methods.lora.convolution import lora_of_convolution
from graphpeft.methods.lora.dora import Lora, with_magnitudes
from graphpeft.methods.lora.dora_leaf import DoraLeaf
from graphpeft.methods.lora.embedding import LoraEmbedding, LoraTable
from graphpeft.methods.lora.kernels import LoraKernels
from graphpeft.methods.lora.linear import LoraLeaf, LoraLinear
from graphpeft.methods.lora.matrix import LoraExperts, LoraMatrix
from graphpeft.methods.lora.parts import LoraParts
from graphpeft.methods.lora.tied import LoraTied
from graphpeft.methods.lora.variants import kinds
from graphpeft.rules.rule import Rule
from graphpeft.sites.site import Site


def rule_for(config: Any, site: Any, dtype: torch.dtype) -> Rule:
    """Returns the rule for the kind of operation that uses a weight, or for a call."""
    lora = _without_rounding(config, site, dtype)
    return kinds.rule_for(config, site, merge_aware.as_merged(lora, site, config.merged_quantiser))


def _without_rounding(config: Any, site: Any, dtype: torch.dtype) -> Rule:
    drops, casts = config.lora_dropout > 0, site.dtype != dtype
    if site.op is Leaf:
        leaf = LoraLeaf(drops=drops)
        return DoraLeaf(leaf) if config.use_dora and site.is_recoded else leaf
    if site.parts:
        flipped = site.is_layer and site.transposed
        rows = site.shape[1] if flipped else site.shape[0]
        return LoraParts(parts=site.parts, rows=rows, flipped=flipped, drops=drops, casts=casts)
    if site.tied_to is not None and site.layout is not ops.Embedding:
        return LoraTied(drops=drops, casts=casts)
    lora = _without_magnitudes(config, site, drops, casts)
    return with_magnitudes(lora, site) if config.use_dora else lora


def _without_magnitudes(config: Any, site: Site, drops: bool, casts: bool) -> Lora:
    flipped, has_bias = site.is_layer and site.transposed, config.lora_bias
    if site.layout is ops.Convolution:
        return lora_of_convolution(site, config, casts)
    if site.layout is ops.Embedding:
        return LoraEmbedding(casts=casts) if site.is_layer else LoraTable(casts=casts)
    if site.layout is ops.Weight and len(site.shape) == 3:
        return LoraExperts(experts=site.shape[0], flipped=site.transposed, drops=drops)
    if site.layout is ops.Weight and len(site.shape) > 3:
        return LoraKernels(shape=site.shape)
    if site.op is ops.Weight:
        has_input = site.is_layer and site.layout is ops.Linear and not config.use_dora
        return LoraMatrix(flipped=flipped, drops=drops and has_input)
    return LoraLinear(flipped=flipped, drops=drops, casts=casts, has_bias=has_bias)
