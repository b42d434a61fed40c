"""The base class of the configs of methods whose virtual tokens are keys and values in a Transformers model's cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from graphpeft.methods.prompts.caches import other_cache_names
from graphpeft.methods.prompts.in_cache import InCache
from graphpeft.methods.prompts.key_sizes import default_sizes, possible_sizes, sizes_in_layers
from graphpeft.methods.prompts.model_sizes import text_config_of
from graphpeft.methods.prompts.prompt_config import PromptLearningConfig
from graphpeft.methods.prompts.prompt_rule import PromptRule
from graphpeft.methods.prompts.transformers_sites import GENERATOR, cache_sites, checkpointable
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.rule import Rule
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite


@dataclass(kw_only=True)
class PrefixConfig(PromptLearningConfig):
    """The options of a method whose virtual tokens are keys and values; a size of None is read from the model."""

    adds_tokens: ClassVar[bool] = False

    def check(self) -> None:
        """Raises ValueError for options that a prefix doesn't have."""
        super().check()
        if self.prompt_scope is not None:
            raise ValueError("prompt_scope has no effect on a prefix, which goes into the cache; use prompt tuning")

    def resolved(self, model: nn.Module) -> PrefixConfig:
        """Returns the config with the sizes of the model's keys and values filled in."""
        sizes = {} if self.token_dim is not None else default_sizes(text_config_of(model))
        config = super().resolved(model)
        assert isinstance(config, PrefixConfig)
        for name, size in sizes.items():
            setattr(config, name, size)
        return config

    @property
    def width(self) -> int:
        """The number of values of a virtual token: its keys and values of all layers."""
        assert self.num_layers is not None
        assert self.token_dim is not None
        return 2 * self.num_layers * self.token_dim

    def find_sites(self, finder: SiteFinder, report: Report) -> list[CallSite]:
        """Returns the boundary of the module that takes a cache."""
        if any(finder.modules[path].gradient_checkpointing for path in checkpointable(finder.modules)):
            reason = "a prefix works through the cache, which gradient checkpointing switches off"
            report.refused.append(Refusal("the model", reason, "call gradient_checkpointing_disable() on the model"))
            return []
        return cache_sites(finder, report) if self._fits_cache(finder.modules[""], report) else []

    def _fits_cache(self, model: nn.Module, report: Report) -> bool:
        """Returns whether the prefix can be keys and values of the model, and reports if it can't."""
        known = possible_sizes(text_config_of(model))
        reasons = [
            f"{name} is {getattr(self, name)}, and the model has {' or '.join(map(str, sizes))}"
            for name, sizes in known.items()
            if sizes and getattr(self, name) not in sizes
        ]
        if self.token_dim and self.num_attention_heads and self.token_dim % self.num_attention_heads:
            reasons.append(f"token_dim={self.token_dim} is no multiple of num_attention_heads")
        elif not reasons and not self._fits_layers(model, report):
            return False
        report.refused += [Refusal("the model", reason, "leave the sizes out of the config") for reason in reasons]
        return not reasons

    def _fits_layers(self, model: nn.Module, report: Report) -> bool:
        """Returns whether the prefix is wide enough for all layers, and reports if it isn't; PEFT leaves some out."""
        assert self.num_attention_heads is not None
        assert self.token_dim is not None
        of_head, sizes = self.token_dim // self.num_attention_heads, sizes_in_layers(text_config_of(model))
        wider = [size for size in sizes if not size.fits(self.num_attention_heads, of_head)]
        if wider:
            heads, widest = max(size.heads for size in sizes), max(size.of_head for size in sizes)
            report.refused.append(
                Refusal(
                    "the model",
                    f"{len(wider)} of {len(sizes)} layers have keys of {wider[0].heads} heads of size "
                    f"{wider[0].of_head}, and the prefix has {self.num_attention_heads} of size {of_head}",
                    f"set token_dim={heads * widest} and num_attention_heads={heads}, which fits all layers",
                )
            )
        return not wider

    def rule_for(self, site: CallSite, dtype: torch.dtype) -> Rule:
        """Returns the rule for a boundary."""
        assert self.num_virtual_tokens is not None
        assert self.num_layers is not None
        assert self.num_attention_heads is not None
        sizes = (self.num_virtual_tokens, self.num_layers, self.num_attention_heads)
        counts = site.role == GENERATOR
        return PromptRule(self.encoder_in_use(), InCache(*sizes, other_cache_names(site.arguments), counts))
