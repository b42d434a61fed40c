"""HRA: a weight is multiplied by a chain of Householder reflections.

    y = W H₁ … Hᵣ x + b        Hᵢ = 1 − 2 uᵢ uᵢᵀ / ‖uᵢ‖²        W' = W H₁ … Hᵣ
    H₁ … Hᵣ = 1 − U T Uᵀ       U with columns of length 1, T (r, r) upper triangular: two thin products
    W' = W (1 − 2 Q Qᵀ)        with `apply_GS`: Q is U made orthonormal by Gram and Schmidt

Source: Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
Adaptation", arXiv 2405.17484; the same numbers as PEFT's ``tuners/hra/layer.py``.
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
from graphpeft.rules.delta_rule import DeltaRule, WeightRule
from graphpeft.rules.options import Editable, Size, TrainedBiases
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.rule import InputRule, Rule
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class Reflections(WeightRule):
    """The reflections of the rows of one weight.

    Attributes:
        are_orthonormal: Whether the vectors are made orthonormal.
    """

    are_orthonormal: bool

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Convolution, ops.Weight)
    needs_matrix: ClassVar[bool] = True
    adapts_calls: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses first values of which Gram and Schmidt make noise."""
        reason = super().check(site, config)
        if reason is None and self.are_orthonormal and config.starts_in_pairs and not config.inference_mode:
            return (
                "apply_GS makes its vectors orthonormal; of each two that are equal, as they are at first, it makes a "
                "vector of rounding errors: set init_weights=False, or choose an odd r"
            )
        return reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns U; the positions of a kernel count as features."""
        stack, _, features = matrices_of(site)
        return {"hra_u": ParameterSpec((*stack, features, config.r), key="hra_u")}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws pairs of equal vectors, whose reflections undo each other, or draws all."""
        u = parameters["hra_u"]
        for matrix in u.flatten(0, -3) if u.ndim > 2 else (u,):
            drawn = matrix.new_empty(len(matrix), config.r // 2) if config.starts_in_pairs else matrix
            nn.init.kaiming_uniform_(drawn, a=5**0.5)
            if config.starts_in_pairs:
                matrix.copy_(drawn.repeat_interleave(2, dim=1))

    def delta(self, weight: Any, hra_u: Any) -> Any:
        """Returns W H₁ … Hᵣ − W."""
        matrix = weight.flatten(1) if self.layout.kernel else weight
        return self.shaped(reflected(matrix, hra_u, self.are_orthonormal, False) - matrix)


@dataclass(frozen=True, kw_only=True)
class InputReflections(Reflections, InputRule):
    """The reflections of what goes into a linear layer."""

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    def enter(self, x: Any, hra_u: Any) -> Any:
        """Returns H₁ … Hᵣ x."""
        return reflected(x.to(hra_u.dtype), hra_u, self.are_orthonormal, True).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class WeightReflections(Reflections, DeltaRule):
    """The reflections of a weight whose features aren't just those of an operation's input."""


@recorded
def reflected(x: Tensor, u: Tensor, are_orthonormal: bool, is_transposed: bool) -> Tensor:
    """Returns x H₁ … Hᵣ, or x Hᵣ … H₁.

    Args:
        x: Of shape (…, features).
        u: The vectors, of shape (…, features, r).
        are_orthonormal: Whether they are made orthonormal first, so that their reflections are one.
        is_transposed: Whether the product of the reflections is transposed.
    """
    if are_orthonormal:
        q = orthonormal(u)
        return x - 2 * (x @ q) @ q.mT
    unit = u / u.norm(dim=-2, keepdim=True)
    core = _core(unit.mT @ unit)
    return x - x @ unit @ (core.mT if is_transposed else core) @ unit.mT


def _core(inner: Tensor) -> Tensor:
    """Returns T, from the inner products of the vectors, (…, r, r)."""
    twice = 2 * torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device).expand_as(inner)
    core = twice[..., :1, :1]
    for size in range(1, inner.shape[-1]):
        column = -2 * core @ inner[..., :size, size : size + 1]
        core = torch.cat((torch.cat((core, column), -1), twice[..., size : size + 1, : size + 1]), -2)
    return core


def orthonormal(u: Tensor) -> Tensor:
    """Returns vectors made orthonormal, one after the other.

    Args:
        u: The vectors, of shape (…, features, r).
    """
    made = []
    for _ in range(u.shape[-1]):
        first = u[..., :1] / u[..., :1].norm(dim=-2, keepdim=True)
        made.append(first)
        u = u[..., 1:] - first @ (first.mT @ u[..., 1:])
    return torch.cat(made, -1)


@register
@dataclass(kw_only=True)
class HRAConfig(TargetedConfig):
    """The options of HRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
    Adaptation", arXiv 2405.17484.

    Differs from PEFT: `apply_GS` with the first values of an even rank is refused. PEFT divides rounding errors by
    their length there, so that its fresh adapter changes the outputs at random.

    Differs from PEFT: convolutions have the dilation, groups and padding mode of their layer, and kernels of any shape;
    PEFT refuses or ignores these. All groups have the same reflections.

    Attributes:
        r: The number of reflections; best an even one.
        apply_GS: Whether the vectors are made orthonormal by Gram and Schmidt.
        init_weights: Whether vectors are equal in pairs at first, so that nothing changes, if r is even; else all are
            drawn.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"hra_only"``, the adapted layers'.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), HRAConfig(r=4, target_modules=["0"]))
        >>> model[0].default.hra_u.shape
        torch.Size([8, 4])
    """

    peft_type: ClassVar[PeftType] = PeftType.HRA
    prefix: ClassVar[str | None] = "hra_"
    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 8
    apply_GS: bool = False  # noqa: N815
    init_weights: Editable[bool] = True
    bias: TrainedBiases[Literal["none", "all", "hra_only"]] = "none"

    @property
    def starts_in_pairs(self) -> bool:
        """Whether vectors are equal in pairs at first."""
        return self.init_weights and self.r % 2 == 0

    @property
    def starts_as_identity(self) -> Literal["within rounding"] | bool:
        """Whether the reflections undo each other, which they do within rounding."""
        return "within rounding" if self.starts_in_pairs else False

    def rule_for(self, site: Any, dtype: torch.dtype) -> Rule:
        """Returns the rule for a linear layer's inputs, or for a weight."""
        if isinstance(site, LeafSite) or (site.op is ops.Linear and not site.both_ways):
            return InputReflections(are_orthonormal=self.apply_GS)
        return WeightReflections(are_orthonormal=self.apply_GS)
