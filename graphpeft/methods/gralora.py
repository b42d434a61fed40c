"""GraLoRA: a matrix of k × k blocks, each of which is a product of rank r/k, and beside it a product of the whole.

    ΔW = s · (blocks + G H)        block (m, n) = (A[n]ₘ B[m]ₙ)ᵀ        s = α / (r + h)

A[n], (in/k, r), is of the n-th part of the inputs, and B[m], (r, out/k), of the m-th part of the outputs. Both have
their ranks in k parts, so that A[n]ₘ is (in/k, r/k) and B[m]ₙ (r/k, out/k). G is (out, h), and H (h, in).

Source: Jung et al., "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", arXiv 2505.20355; the
same numbers as PEFT's ``tuners/gralora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.rules.delta_rule import DeltaRule
from graphpeft.rules.options import Index, InitWeights, InputDropout, Number, Size, TrainedBiases, Turned
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class Gralora(DeltaRule):
    """The change of a matrix, or of each matrix in a stack.

    Attributes:
        parts: k.
    """

    parts: int

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Weight)
    scales: ClassVar[tuple[str, ...]] = ("scale",)
    adapts_calls: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses weights that are no matrices, and features that k doesn't divide."""
        reason = super().check(site, config)
        if reason is None and len(_shape(site)) not in (2, 3):
            reason = f"its {site.attribute} of shape {_shape(site)} is no matrix"
        for kind, size in zip(("inputs", "outputs"), reversed(_shape(site)), strict=False):
            if reason is None and size % self.parts:
                reason = f"gralora_k={self.parts} doesn't divide its {size} {kind}"
        return reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, and H and G if there are any."""
        *stack, rows, columns = _shape(site)
        k, r, h = self.parts, config.r, config.hybrid_r
        shapes = {"gralora_A": (k, columns // k, r), "gralora_B": (k, r, rows // k)}
        if h:
            shapes |= {"gralora_A_general": (h, columns), "gralora_B_general": (rows, h)}
        keys = {name: f"{name}.weight" if name.endswith("general") else name for name in shapes}
        return {name: ParameterSpec((*stack, *shape), keys[name]) for name, shape in shapes.items()}

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns s."""
        return {"scale": config.alpha / (config.r + config.hybrid_r)}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and H, and sets B and G to zero or draws them, too."""
        is_stack = len(_shape(site)) == 3
        for each in range(_shape(site)[0] if is_stack else 1):
            own = {name: tensor[each] if is_stack else tensor for name, tensor in parameters.items()}
            # PEFT draws block by block, and transposes them
            for a, b in zip(own["gralora_A"], own["gralora_B"], strict=True):
                a.copy_(_drawn(a.mT).mT)
                b.copy_(_drawn(b.mT, config.init_weights).mT)
            if config.hybrid_r:
                a, b = own["gralora_A_general"], own["gralora_B_general"]
                for layer in (a, b):  # PEFT builds layers, which draw by themselves
                    _drawn(layer)
                a.copy_(_drawn(a))
                b.copy_(_drawn(b, config.init_weights))

    def delta(
        self, gralora_A: Any, gralora_B: Any, scale: Any, gralora_A_general: Any = None, gralora_B_general: Any = None
    ) -> Any:
        """Returns ΔW."""
        a, b = gralora_A.unflatten(-1, (self.parts, -1)), gralora_B.unflatten(-2, (self.parts, -1))
        change = torch.einsum("...nims,...mnso->...moni", a, b).flatten(-4, -3).flatten(-2)
        if gralora_A_general is not None:
            change = change + gralora_B_general @ gralora_A_general
        return change * scale


@dataclass(frozen=True, kw_only=True)
class GraloraBranch(Gralora):
    """The branch beside a linear operation, or beside the call of a layer."""

    def rewrite(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Any,
        y: Any,
        operation: Any,
        training: Any,
        gralora_A: Any,
        gralora_B: Any,
        scale: Any,
        gralora_A_general: Any = None,
        gralora_B_general: Any = None,
        dropout: Any = None,
    ) -> Any:
        """Returns y + s · (blocks + G H) dropout(x), with a dropout of its own for each of both."""
        h = self.entering(x, gralora_A, training, dropout)
        inner = torch.einsum("...ni,nir->...nr", h.unflatten(-1, (self.parts, -1)), gralora_A)
        exchanged = inner.unflatten(-1, (self.parts, -1)).transpose(-3, -2).flatten(-2)
        result = add_scaled(y, torch.einsum("...mr,mro->...mo", exchanged, gralora_B).flatten(-2), scale)
        if gralora_A_general is not None:
            h = self.entering(x, gralora_A_general, training, dropout)
            result = add_scaled(result, F.linear(F.linear(h, gralora_A_general), gralora_B_general), scale)
        return self.leaving(result, y)


def _shape(site: Any) -> tuple[int, ...]:
    """Returns (out, in) of a site, or that of a stack of matrices."""
    return (site.out_features, site.in_features) if isinstance(site, LeafSite) else site.matrix_shape


def _drawn(factor: Tensor, is_zero: bool = False) -> Tensor:
    """Returns first values for a factor; a view would be filled in the order of its memory."""
    made = torch.zeros(factor.shape, dtype=factor.dtype)
    return made if is_zero else nn.init.kaiming_uniform_(made, a=5**0.5)


@register
@dataclass(kw_only=True)
class GraloraConfig(TargetedConfig):
    """The options of GraLoRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Jung et al., "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", arXiv 2505.20355.

    Attributes:
        r: r, the rank of all blocks of a row together; `gralora_k` divides it.
        hybrid_r: h, the rank of the product of the whole.
        alpha: α; the scale is α/(r + h).
        gralora_dropout: The probability of dropping an element of the branch's input in training.
        gralora_k: k, the number of parts of the inputs and of the outputs.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"gralora_only"``, the adapted layers'.
        init_weights: Whether B and G are zero at first; if False, they are drawn like A.

    Raises:
        ValueError: For a value that an option can't have, and for a rank that `gralora_k` doesn't divide.

    Examples:
        >>> config = GraloraConfig(r=4, gralora_k=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> model[0].default.gralora_A.shape, model[0].default.gralora_B.shape
        (torch.Size([2, 4, 4]), torch.Size([2, 4, 8]))
    """

    peft_type: ClassVar[PeftType] = PeftType.GRALORA
    prefix: ClassVar[str | None] = "gralora_"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 32
    hybrid_r: Index = 0
    alpha: Number = 64
    gralora_dropout: InputDropout = 0.0
    gralora_k: Size = 2
    fan_in_fan_out: Turned = False
    bias: TrainedBiases[Literal["none", "all", "gralora_only"]] = "none"
    init_weights: InitWeights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.gralora_k:
            raise ValueError(f"gralora_k={self.gralora_k} must divide r={self.r}, the rank of all its blocks together")

    def rule_for(self, site: Any, dtype: torch.dtype) -> Gralora:
        """Returns the rule of a linear operation, of a call, or of any other use of a weight."""
        if isinstance(site, LeafSite):
            return GraloraBranch(parts=self.gralora_k, casts=True)
        is_branch = site.op is site.layout is ops.Linear and not site.both_ways
        return (GraloraBranch if is_branch else Gralora)(parts=self.gralora_k)
