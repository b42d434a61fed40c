"""LoRA with an adapter of its own for each call of a shared module, such as the one layer of an ALBERT.

    y_i = x_i Wᵀ + b + s · dropout(x_i) A_iᵀ B_iᵀ          for the i-th operation with the one weight W

Only a flat graph of the whole model tells the calls apart, so the model has to be traced first. A weight that is used
once has a plain adapter. The changes can't be merged, since the weight has no place for more than one, nor can PEFT
hold them: it knows modules, not calls. Therefore files name a method that PEFT doesn't know, and the call is the last
part of their tensors' names: ``….query.lora_A.weight.call_2``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from graphpeft.graph.errors import TraceError
from graphpeft.methods.lora.config import LoraConfig
from graphpeft.methods.lora.factors import exact_patterns
from graphpeft.rules.combination import Combination
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.registry import register
from graphpeft.rules.report import Refusal, Report
from graphpeft.sites.calls import calls_of
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import Site

_WAY_OUT = "adapt a trace of it, get_peft_model(trace(model, example_inputs), config), or take LoraConfig for all calls"


@register
@dataclass(kw_only=True)
class LoraPerCallConfig(LoraConfig):
    """The options of `LoraConfig`, for an adapter at each call of a shared module.

    In `rank_pattern` and `alpha_pattern`, ``query.call_2`` is the second call of ``query``.

    Examples:
        >>> layer = nn.Linear(4, 4)
        >>> graph = trace(nn.Sequential(layer, nn.ReLU(), layer))
        >>> model = get_peft_model(graph, LoraPerCallConfig(r=2, target_modules=["0"]))
        >>> [adapted.site.label for adapted in model.adapter_report().adapted]
        ['0.call_1', '0.call_2']
    """

    peft_type: ClassVar[Any] = "GRAPHPEFT_LORA_PER_CALL"

    def find_sites(self, finder: SiteFinder, report: Report) -> list[Any]:
        """Returns the calls with the weights that the config names, each as a site."""
        found: list[Any] = []
        for site in super().find_sites(finder, report):
            if isinstance(site, Site) and site.tied_to not in (None, site.owner):
                reason = f"it is tied to {site.tied_to}, and each call has factors of its own"
                report.refused.append(Refusal(site.label, reason, "leave ensure_weight_tying False"))
            try:
                found += calls_of(finder.regions, site)
            except TraceError as error:
                report.refused.append(Refusal(site.label, f"its calls can't be told apart: {error}", _WAY_OUT))
        return found

    def naming(self, sites: Sequence[Any], names: Collection[str]) -> PeftConfig:
        """Returns the config that names these sites alone: all calls of a weight, or none.

        Raises:
            ValueError: If there are some calls of a weight.
        """
        kept = Counter((site.owner, site.attribute) for site in sites)
        for site in sites:
            if site.call is not None and kept[site.owner, site.attribute] < site.call.of:
                raise ValueError(f"no config names some calls of {site.name} alone; let where hold for all or none")
        return super().naming(sites, names)

    def for_file(self, sites: Sequence[Any]) -> LoraConfig:
        """Returns the config with the rank and the α of each call; the rest isn't made PEFT's, which can't read it."""
        config = copy.deepcopy(self)
        config.rank_pattern, config.alpha_pattern = exact_patterns(sites, self)
        return config

    def fitted_to(self, keys: Collection[str]) -> LoraConfig:
        """Returns the config as it is: the file has the parts' own ranks and α."""
        return self

    def combined(self, configs: Sequence[Any], sites: Sequence[Any], how: Combination) -> LoraConfig:
        """Refuses to combine adapters of calls.

        Raises:
            ValueError: Always.
        """
        raise ValueError("adapters of calls can't be combined yet; leave them out")
