"""BEFT: a bias that is added to what comes out of a layer.

    y' = W x + b + β        b' = b + β

Source: "BEFT: Bias-Efficient Fine-Tuning of Language Models", arXiv 2509.15974; the same numbers as PEFT's
``tuners/beft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.rules.delta_rule import WeightRule
from graphpeft.rules.options import InitWeights
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.rule import OperationRule
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class AddedBias(WeightRule, OperationRule):
    """The bias that is added to one layer's outputs.

    Attributes:
        positions: The number of dimensions behind the features: those of a convolution's kernel.
    """

    positions: int = 0

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Convolution)

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses weights of which no operation is known to which a bias could be added."""
        if isinstance(site, LeafSite):
            return None
        if site.op is ops.Weight:
            return f"a bias is added to what an operation gives, and no one operation uses its {site.attribute}"
        return super().check(site, config)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns β, (1, out)."""
        return {"beft_bias": ParameterSpec((1, site.out_features), key="beft_bias")}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws β, and sets it to zero where the config asks for it, as PEFT does."""
        parameters["beft_bias"].normal_()
        if config.init_weights:
            parameters["beft_bias"].zero_()

    def rewrite(self, y: Any, beft_bias: Any) -> Any:
        """Returns y + β."""
        return (y + beft_bias.reshape(-1, *(1,) * self.positions)).to(y.dtype)

    def delta(self, weight: Any, beft_bias: Any) -> Any:
        """Returns zeros: the weight doesn't change."""
        return torch.zeros_like(weight)

    def bias_delta(self, beft_bias: Any) -> Any:
        """Returns β."""
        return beft_bias.flatten()

    def unmergeable(self, site: Any) -> str | None:
        """Refuses layers without a bias, as PEFT does, and quantised ones, of which codes alone are merged."""
        if isinstance(site, LeafSite):
            return "only codes of quantised layers are merged, and no bias"
        if site.bias is None and site.bias_conflict is None:
            return "it has no bias, into which another could be merged; give it one before you adapt it"
        return None


@register
@dataclass(kw_only=True)
class BeftConfig(TargetedConfig):
    """The options of BEFT beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: "BEFT: Bias-Efficient Fine-Tuning of Language Models", arXiv 2509.15974.

    Attributes:
        init_weights: Whether biases are zero at first; if False, they are drawn from a normal distribution.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), BeftConfig(target_modules=["0"]))
        >>> model[0].default.beft_bias.shape
        torch.Size([1, 16])
    """

    peft_type: ClassVar[PeftType] = PeftType.BEFT
    prefix: ClassVar[str | None] = "beft_"
    adapts_leaves: ClassVar[bool] = True
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    default_targets: ClassVar[targets.Defaults] = MappingProxyType(
        {
            **dict.fromkeys(("t5", "mt5"), ("v",)),
            **dict.fromkeys(("roberta", "bert"), ("value",)),
            **dict.fromkeys(("opt", "gptj", "gpt_neo", "bart", "phi"), ("v_proj",)),
            **dict.fromkeys(("llama", "llama4", "mistral", "mixtral"), ("v_proj",)),
            **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("v_proj",)),
            "deberta-v2": ("value_proj",),
        }
    )

    init_weights: InitWeights = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> AddedBias:
        """Returns the rule for a layer."""
        if isinstance(site, LeafSite) or site.layout is not ops.Convolution:
            return AddedBias()
        return AddedBias(positions=len(site.shape) - 2)
