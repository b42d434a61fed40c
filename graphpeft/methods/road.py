"""RoAd: what comes out of a layer is rotated and scaled in pairs of features.

    y' = R (W x + b)        W' = R W        b' = R b
    y'₁ = α₁ cos θ₁ · y₁ − α₁ sin θ₁ · y₂        for each pair of features, with
    y'₂ = α₂ sin θ₂ · y₁ + α₂ cos θ₂ · y₂        one θ and α, one for each row of R, or for each of its elements

A feature of the first half of a group is paired with that at the same place of the second half.

Source: Liao and Monz, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
arXiv 2409.00119; the same numbers as PEFT's ``tuners/road/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.recorded import recorded
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.matrices import matrices_of
from graphpeft.rules.delta_rule import WeightRule
from graphpeft.rules.options import InitWeights, Size
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.rule import OperationRule
from graphpeft.sites.site import LeafSite, Site
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig

Variant = Literal["road_1", "road_2", "road_4"]


@dataclass(frozen=True, kw_only=True)
class PairRotations(WeightRule, OperationRule):
    """The rotations of one layer's outputs.

    Attributes:
        variant: Which elements of R have angles and scales of their own.
        group: The number of features of a group.
    """

    variant: Variant
    group: int

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Convolution, ops.Weight)
    needs_matrix: ClassVar[bool] = True
    adapts_calls: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses features that don't fall into groups."""
        reason = super().check(site, config)
        features = None if reason else matrices_of(site).rows
        if features is not None and features % self.group:
            return f"its {features} output features don't fall into groups of group_size={self.group}"
        return reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the angles and the scales."""
        stack, features, _ = matrices_of(site)
        shape = (*stack, features * {"road_1": 1, "road_2": 2, "road_4": 4}[self.variant] // 2)
        return {name: ParameterSpec(shape, key=name) for name in ("road_theta", "road_alpha")}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Sets angles to 0 and scales to 1, or draws them."""
        if config.init_weights:
            parameters["road_theta"].zero_()
            parameters["road_alpha"].fill_(1)
        else:
            parameters["road_theta"].normal_(std=0.5)
            parameters["road_alpha"].normal_(mean=1, std=0.5)

    def rewrite(self, y: Any, road_theta: Any, road_alpha: Any) -> Any:
        """Returns R y."""
        return self._turned(y.to(road_theta.dtype), road_theta, road_alpha, len(self.layout.kernel)).to(y.dtype)

    def delta(self, weight: Any, road_theta: Any, road_alpha: Any) -> Any:
        """Returns R W − W."""
        return self._turned(weight, road_theta, road_alpha, len(self.layout.kernel) + 1) - weight

    def bias_delta(self, bias: Any, road_theta: Any, road_alpha: Any) -> Any:
        """Returns R b − b."""
        return self._turned(bias.to(road_theta.dtype), road_theta, road_alpha, 0) - bias

    def unmergeable(self, site: Any) -> str | None:
        """Refuses quantised layers with a bias, which is no part of their codes, and rotations across groups."""
        if isinstance(site, Site) and site.groups > 1 and matrices_of(site).rows // site.groups % self.group:
            return (
                f"a group of group_size={self.group} features has some of two groups of the convolution, whose kernels "
                "see other channels"
            )
        if isinstance(site, LeafSite) and "bias" in dict(site.reads):
            return "its bias would be rotated, too, and only codes of quantised layers are merged"
        return None

    def _turned(self, features: Any, theta: Any, alpha: Any, behind: int) -> Any:
        return turned(features, theta, alpha, self.variant, self.group, behind)


@recorded
def turned(y: Tensor, theta: Tensor, alpha: Tensor, variant: Variant, group: int, behind: int) -> Tensor:
    """Returns R y.

    Args:
        y: Of shape (…, features), with further dimensions behind.
        theta: The angles, of shape (…, features / 2), or twice or four times as many.
        alpha: The scales, of the same shape.
        variant: Which elements have angles and scales of their own.
        group: The number of features of a group.
        behind: The number of dimensions behind the features.
    """
    if variant == "road_1":
        theta, alpha = (
            each.unflatten(-1, (-1, 1, group // 2)).expand(*each.shape[:-1], -1, 2, -1).flatten(-3)
            for each in (theta, alpha)
        )
    if variant == "road_4":
        (of_own, of_other), (own_scale, other_scale) = (
            each.unflatten(-1, (-1, 2, group)).transpose(-3, -2).flatten(-2).unbind(-2) for each in (theta, alpha)
        )
    else:
        of_own, of_other, own_scale, other_scale = theta, theta, alpha, alpha
    own, other = (
        each.reshape(*each.shape, *(1,) * behind) for each in (own_scale * of_own.cos(), other_scale * of_other.sin())
    )
    first, second = y.unflatten(-1 - behind, (-1, 2, group // 2)).unbind(-2 - behind)
    exchanged = torch.stack((-second, first), -2 - behind).flatten(-3 - behind, -1 - behind)
    return y * own + exchanged * other


@register
@dataclass(kw_only=True)
class RoadConfig(TargetedConfig):
    """The options of RoAd beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Liao and Monz, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
    Composability", arXiv 2409.00119.

    Attributes:
        variant: The parameters of each pair of features: ``"road_1"``: one angle and one scale. ``"road_2"``: one for
            each of the two. ``"road_4"``: two for each.
        group_size: The number of output features in whose two halves pairs are formed; an even number that divides
            that of the layer.
        init_weights: Whether nothing is rotated at first; if False, angles and scales are drawn.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> config = RoadConfig(variant="road_2", group_size=4, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> model[0].default.road_theta.shape
        torch.Size([16])
    """

    peft_type: ClassVar[PeftType] = PeftType.ROAD
    prefix: ClassVar[str | None] = "road_"
    adapts_leaves: ClassVar[bool] = True
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    variant: Variant = "road_1"
    group_size: Size = 64
    init_weights: InitWeights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise ValueError(f"group_size is {self.group_size}, which has no two halves; choose an even number")

    def rule_for(self, site: Any, dtype: torch.dtype) -> PairRotations:
        """Returns the rule for a layer."""
        return PairRotations(variant=self.variant, group=self.group_size)
