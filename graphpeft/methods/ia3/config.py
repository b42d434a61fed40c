"""(IA)³: a learned factor for each feature that goes into a layer, or that comes out of it.

    y = W (l ⊙ x) + b         at `feedforward_modules`:  W' = W diag(l)
    y = l ⊙ (W x + b)         at the other targets:      W' = diag(l) W    b' = l ⊙ b

Each matrix in a stack, such as an expert's, has factors of its own. Source: Liu et al., "Few-Shot Parameter-Efficient
Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv 2205.05638; the same numbers as PEFT's
``tuners/ia3/layer.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.methods.ia3.rule import InputFactors, OutputFactors
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.combination import Combination, Part
from graphpeft.rules.options import InitWeights, Turned
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.rule import Rule
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.patterns import Pattern
from graphpeft.targeting.target_config import TargetedConfig

FEED_FORWARD: dict[str, tuple[str, ...]] = {
    "t5": ("wo",),
    "mt5": (),
    "gpt2": ("mlp.c_proj",),
    "bloom": ("mlp.dense_4h_to_h",),
    "roberta": ("output.dense",),
    "opt": ("fc2",),
    "gptj": ("fc_out",),
    "gpt_neox": ("dense_4h_to_h",),
    "gpt_neo": ("c_proj",),
    "bart": ("fc2",),
    "gpt_bigcode": ("mlp.c_proj",),
    "llama": ("down_proj",),
    "llama4": ("down_proj",),
    "mistral": ("down_proj",),
    "mixtral": ("w2",),
    "bert": ("output.dense",),
    "deberta-v2": ("output.dense",),
    "deberta": ("output.dense",),
    "RefinedWeb": ("dense_4h_to_h",),
    "RefinedWebModel": ("dense_4h_to_h",),
    "falcon": ("dense_4h_to_h",),
    "phi": ("fc2",),
    "gemma": ("down_proj",),
    "gemma2": ("down_proj",),
    "gemma3_text": ("down_proj",),
    "qwen2": ("down_proj",),
    "qwen3": ("down_proj",),
}
"""The targets whose inputs are scaled."""

OTHERS: dict[str, tuple[str, ...]] = {
    "t5": ("k", "v"),
    "mt5": ("k", "v", "wi_1"),
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "roberta": ("key", "value"),
    "opt": ("q_proj", "k_proj"),
    "gptj": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gpt_neo": ("q_proj", "v_proj"),
    "bart": ("q_proj", "v_proj"),
    "gpt_bigcode": ("c_attn",),
    "llama": ("k_proj", "v_proj"),
    "llama4": ("q_proj", "v_proj"),
    "mistral": ("k_proj", "v_proj"),
    "mixtral": ("k_proj", "v_proj"),
    "bert": ("key", "value"),
    "deberta-v2": ("key_proj", "value_proj"),
    "deberta": ("in_proj",),
    "RefinedWeb": ("query_key_value",),
    "RefinedWebModel": ("query_key_value",),
    "falcon": ("query_key_value",),
    "phi": ("q_proj", "v_proj"),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
}
"""The targets whose outputs are scaled."""


@register
@dataclass(kw_only=True)
class IA3Config(TargetedConfig):
    """The options of (IA)³ beside the ones that name targets; the names, defaults and meanings are PEFT's.

    The matrices of a stack are (out, in), and (in, out) where its module has the attribute ``is_transposed`` with the
    value True, as those of experts in Transformers: how it is multiplied doesn't tell its outputs from its inputs.

    Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv
    2205.05638.

    Attributes:
        feedforward_modules: The targets whose inputs are scaled, in place of their outputs: a list of endings
            of their paths, or a regular expression for whole paths. None takes the default for the model's
            `model_type`.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        init_ia3_weights: Whether all factors are 1 at first; if False, they are drawn from a normal distribution.

    Raises:
        ValueError: For a value that an option can't have, and for `feedforward_modules` that aren't among the targets.

    Examples:
        >>> config = IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), config)
        >>> model[0].default.ia3_l.shape, model[2].default.ia3_l.shape
        (torch.Size([16, 1]), torch.Size([1, 16]))
    """

    peft_type: ClassVar[PeftType] = PeftType.IA3
    prefix: ClassVar[str | None] = "ia3_"
    lacks: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})
    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = {
        name: (*others, *FEED_FORWARD[name]) for name, others in OTHERS.items()
    }

    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: Turned = False
    init_ia3_weights: InitWeights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, list | tuple):
            self.feedforward_modules = set(self.feedforward_modules)
        named, among = self.feedforward_modules, self.target_modules
        if isinstance(named, set) and isinstance(among, set) and not named <= among:
            raise ValueError(f"feedforward_modules names {sorted(named - among)}, which target_modules doesn't name")

    def resolved(self, model: nn.Module) -> IA3Config:
        """Returns the config with `feedforward_modules` filled in."""
        config: Any = super().resolved(model)
        if config.feedforward_modules is None:
            try:
                named = set(targets.default_target_modules(model, FEED_FORWARD))
            except ValueError as error:
                raise ValueError(
                    "feedforward_modules is None, and no default is known for the model; name those targets whose "
                    "inputs are scaled, or give [] for none"
                ) from error
            among = config.target_modules
            if isinstance(among, set):
                # a file is read only if its feed-forward modules are targets
                inside = {name for name in named if any(name.endswith(f".{target}") for target in among)}
                config.target_modules = among | inside
                named = {target for target in config.target_modules if target.endswith(tuple(named))}
            config.feedforward_modules = named
        return config

    def rule_for(self, site: Any, dtype: torch.dtype) -> Rule:
        """Returns the rule for a layer's inputs or for its outputs."""
        rule = InputFactors if self._is_feed_forward(site.name) else OutputFactors
        if not isinstance(site, LeafSite) and site.layout is ops.Convolution:
            return rule(positions=len(site.matrix_shape) - 2, groups=site.groups)
        return rule()

    def _is_feed_forward(self, name: str) -> bool:
        named = self.feedforward_modules or ()
        if isinstance(named, str):
            return Pattern(named, named, "feedforward_modules").fullmatch(name) is not None
        return name.endswith(tuple(named))

    def combined(self, configs: Sequence[Any], sites: Sequence[Any], how: Combination) -> IA3Config:
        """Returns the config that names the targets of all.

        Raises:
            ValueError: If some name their targets by lists and others by patterns, or `combination_type` is for LoRA.
        """
        if how.kind not in ("linear", "svd"):  # the latter is the default of add_weighted_adapter
            raise ValueError(f"combination_type={how.kind!r} isn't for IA3, whose factors are summed; leave it out")
        config = copy.deepcopy(self)
        for name in ("target_modules", "feedforward_modules"):
            setattr(config, name, _union(name, [getattr(each, name) for each in configs]))
        config.modules_to_save = list(dict.fromkeys(n for each in configs for n in each.modules_to_save or ())) or None
        return config

    def combine(self, target: AdaptedSite, parts: Sequence[Part], how: Combination, count: int) -> Mapping[str, Tensor]:
        """Returns Σ wᵢ lᵢ, as PEFT does."""
        return {"ia3_l": torch.stack([part.tensors["ia3_l"] * part.weight for part in parts]).sum(0)}


def _union(option: str, values: Sequence[Any]) -> set[str] | str:
    """Returns the value of an option that names what these name."""
    if len({isinstance(value, str) for value in values}) > 1:
        raise ValueError(f"{option} is a pattern in some of them, and a list in others; spell it alike")
    if isinstance(values[0], str):
        return "|".join(f"({value})" for value in dict.fromkeys(values))
    return set[str]().union(*values)
