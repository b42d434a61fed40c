"""The base of LoHa and LoKr: a scaled change of a weight, with ranks and α by names, and dropout of the change.

    y' = y + operation(x, m ⊙ ΔW)        ΔW = (α/r) · change        in training, m has zeros for rows of ΔW, or for all

Source: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", arXiv
2309.14859; the same numbers as PEFT's ``tuners/lycoris_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.changed_products import apart_in_training
from graphpeft.graph.recorded import identity_in_evaluation, recorded
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.rules.delta_rule import DeltaRule
from graphpeft.rules.options import Editable, Number, Probability, Size
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LycorisRule(DeltaRule):
    """A change of a matrix, of each matrix in a stack, or of a kernel.

    Attributes:
        rescales: Whether the rows that rank dropout keeps are divided by their share.
    """

    rescales: bool = False

    scales: ClassVar[tuple[str, ...]] = ("scale",)
    needs_matrix: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses dropout where only the weight as such is known."""
        reason = super().check(site, config)
        drops = config.rank_dropout or config.module_dropout
        if reason is None and drops and site.op is ops.Weight and not config.inference_mode:
            reason = (
                f"dropout acts at an operation in training, and no one operation uses its {site.attribute}; set "
                "rank_dropout and module_dropout to 0"
            )
        return reason

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns α/r, and the probabilities of dropout that aren't 0."""
        drops = {"rank_dropout": config.rank_dropout, "module_dropout": config.module_dropout}
        scale = config.value_at("alpha", site) / config.value_at("r", site)
        return {"scale": scale} | {name: p for name, p in drops.items() if p}

    def keeps_apart(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, apart: Any, training: Any, rank_dropout: Any = None, module_dropout: Any = None
    ) -> Any:
        """Returns whether the run is to keep W and ΔW apart, or dropout acts on ΔW."""
        drops = rank_dropout is not None or module_dropout is not None
        return apart_in_training(apart, training) if drops else apart

    def rewrite(
        self,
        x: Any,
        y: Any,
        operation: Any,
        training: Any,
        change: Any,
        bias_change: Any = None,
        dropout: Any = None,
        rank_dropout: Any = None,
        module_dropout: Any = None,
        *,
        apart: Any = None,
    ) -> Any:
        """Returns y + operation(x, ΔW), in training with what dropout leaves of ΔW."""
        if rank_dropout is not None or module_dropout is not None:
            # rows are those in PEFT's layout
            rows, dimensions = self.layout.turned(change), len(self.layout.kernel)
            kept = after_dropout(rows, dimensions, rank_dropout, module_dropout, self.rescales, training)
            change = self.layout.turned(kept)
        return super().rewrite(x, y, operation, training, change, bias_change, dropout, apart=apart)


@identity_in_evaluation
@recorded
def after_dropout(
    change: Tensor,
    kernel_dimensions: int,
    rank_dropout: float | None,
    module_dropout: float | None,
    rescales: bool,
    training: bool,
) -> Tensor:
    """Returns ΔW with zeros for the rows that dropout drops, or for all; draws what PEFT draws, on the CPU.

    Args:
        change: ΔW, of shape (…, out, in, *kernel).
        kernel_dimensions: The number of dimensions of a kernel.
        rank_dropout: The probability of dropping a row; None for 0.
        module_dropout: The probability of dropping all; None for 0.
        rescales: Whether the rows that remain are divided by their share.
        training: Whether dropout is on.
    """
    if not training:
        return change
    # PEFT draws this number at any probability, but without any dropout none is drawn here: weights that no one
    # operation uses draw none, and a model and its flat graph have to draw the same
    is_kept = torch.rand(1) > (module_dropout or 0.0)
    # PEFT draws no rows for a layer that it leaves out
    if rank_dropout and (not module_dropout or is_kept):
        rows = change.shape[: change.ndim - 1 - kernel_dimensions]
        kept = (torch.rand(rows) > rank_dropout).to(change)
        if rescales:
            # without any row, PEFT divides 0 by 0
            kept = kept / kept.mean().clamp(min=1 / kept.numel())
        change = change * kept.reshape(*rows, *(1,) * (1 + kernel_dimensions))
    return change * is_kept.to(change) if module_dropout else change


def draw(tensor: Tensor, site: Any) -> None:
    """Fills a factor as ``nn.Linear`` fills its weight; at a stack of matrices, one factor after the other."""
    is_stack = len(site.shape) == 3 and not site.kernel
    for factor in tensor if is_stack else (tensor,):
        nn.init.kaiming_uniform_(factor, a=5**0.5)


def core_shape(rank: int, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a kernel's core; PEFT gives that of a kernel of one dimension a second one."""
    return rank, rank, *kernel, *(1,) * (len(kernel) == 1)


def core_product(a: Any, b: Any, core: Any) -> tuple[Any, Any]:
    """Returns two matrices whose product is that of a core and its factors, (out, in · kernel)."""
    return a.mT, torch.einsum("ij...,jn->in...", core, b).flatten(1)


@dataclass(kw_only=True)
class LycorisConfig(TargetedConfig):
    """The options that LoHa and LoKr have in common; the names, defaults and meanings are PEFT's.

    Attributes:
        r: The rank.
        alpha: α; the scale is α/r.
        rank_dropout: The probability of dropping a row of ΔW, in training.
        module_dropout: The probability of leaving out a layer's whole change, in training.
        use_effective_conv2d: Whether a kernel larger than 1 is a core, changed in its dimensions by factors.
        rank_pattern: Other ranks, by regular expressions for the end of a path; the first that matches counts.
        alpha_pattern: Other α, by the same kind of patterns.
    """

    patterns: ClassVar[Mapping[str, str]] = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 8
    alpha: Number = 8
    rank_dropout: Editable[Probability] = 0.0
    module_dropout: Editable[Probability] = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, Size] = field(default_factory=dict)
    alpha_pattern: dict[str, Number] = field(default_factory=dict)
