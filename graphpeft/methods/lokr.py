"""LoKr: the change of a weight is a Kronecker product, whose second factor may be a product of low rank.

    ΔW = (α/r) · W₁ ⊗ W₂        W (l k, m n, *kernel): W₁ (l, m), W₂ (k, n, *kernel)
    W₁ = A₁ B₁                  with `decompose_both`, if r is small beside l or m
    W₂ = A₂ B₂                  if r is small beside k or n
    W₂ = A₂ᵀ (T ×₂ B₂)          with `use_effective_conv2d`: T (r, r, *kernel), A₂ (r, k), B₂ (r, n)

Source: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", arXiv
2309.14859; the same numbers as PEFT's ``tuners/lokr/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.methods.lycoris import LycorisConfig, LycorisRule, core_product, core_shape, draw
from graphpeft.rules.options import Editable, Within
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register


@dataclass(frozen=True, kw_only=True)
class LoKr(LycorisRule):
    """The change at one weight."""

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns W₁ and W₂, or the factors of which they are made, in the order in which PEFT draws them."""
        rank, shape = config.value_at("r", site), site.matrix_shape
        *stack, rows, columns = shape[: len(shape) - len(self.layout.kernel)]
        (rows_1, rows_2), (columns_1, columns_2) = (
            two_factors(size, config.decompose_factor) for size in (rows, columns)
        )
        shapes: dict[str, tuple[int, ...]] = {"w1": (rows_1, columns_1)}
        if config.decompose_both and rank < max(rows_1, columns_1) / 2:
            shapes = {"w1_a": (rows_1, rank), "w1_b": (rank, columns_1)}
        if rank >= max(rows_2, columns_2) / 2:
            shapes |= {"w2": (rows_2, columns_2, *self.layout.kernel)}
        elif config.use_effective_conv2d and any(size != 1 for size in self.layout.kernel):
            shapes |= {"w2_a": (rank, rows_2), "w2_b": (rank, columns_2), "t2": core_shape(rank, self.layout.kernel)}
        else:
            shapes |= {"w2_a": (rows_2, rank), "w2_b": (rank, columns_2 * math.prod(self.layout.kernel))}
        return {f"lokr_{name}": ParameterSpec((*stack, *made), key=f"lokr_{name}") for name, made in shapes.items()}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws all but one factor, which is zero: one of W₁, or of W₂ as LyCORIS has it."""
        zeros = {True: ("lokr_w1", "lokr_w1_a"), False: (), "lycoris": ("lokr_w2", "lokr_w2_b")}
        for name, tensor in parameters.items():
            if name in zeros[config.init_weights]:
                tensor.zero_()
            else:
                draw(tensor, site)

    def delta(
        self,
        scale: Any,
        lokr_w1: Any = None,
        lokr_w1_a: Any = None,
        lokr_w1_b: Any = None,
        lokr_w2: Any = None,
        lokr_w2_a: Any = None,
        lokr_w2_b: Any = None,
        lokr_t2: Any = None,
    ) -> Any:
        """Returns ΔW."""
        first = lokr_w1_a @ lokr_w1_b if lokr_w1 is None else lokr_w1
        if lokr_w2 is not None and len(self.layout.kernel) == 1:
            return _interleaved(first, lokr_w2) * scale
        if lokr_w2 is not None:
            second = lokr_w2.flatten(1) if self.layout.kernel else lokr_w2
        else:
            a, b = (lokr_w2_a, lokr_w2_b) if lokr_t2 is None else core_product(lokr_w2_a, lokr_w2_b, lokr_t2)
            second = a @ b
        change = kronecker(first, second) * scale
        return self.shaped(change)


@recorded
def kronecker(first: Tensor, second: Tensor) -> Tensor:
    """Returns W₁ ⊗ W₂ of two matrices, or of each two in stacks.

    Args:
        first: Of shape (…, l, m).
        second: Of shape (…, k, n).
    """
    made = first[..., :, None, :, None] * second[..., None, :, None, :]
    return made.flatten(-4, -3).flatten(-2)


@recorded
def _interleaved(first: Tensor, second: Tensor) -> Tensor:
    """Returns what PEFT makes of W₁ and of a W₂ with a kernel of one dimension, (k, n, size).

    ``torch.kron`` puts the missing dimension of W₁ in front, so that it isn't W₁ ⊗ W₂ at each position. Files have to
    mean the same here and there.
    """
    return torch.kron(first, second).reshape(len(first) * len(second), -1, second.shape[2])


def two_factors(size: int, factor: int) -> tuple[int, int]:
    """Returns two numbers whose product is `size`, the smaller one first, unless `factor` divides it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    smaller = max(each for each in range(1, math.isqrt(size) + 1) if size % each == 0 and (each == 1 or each <= most))
    return smaller, size // smaller


@register
@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """The options of LoKr beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", arXiv
    2309.14859.

    Attributes:
        r: The rank of the factors that are products; those that would be no smaller for it are whole.
        alpha: α; the scale is α/r.
        rank_dropout: The probability of dropping a row of ΔW in training.
        module_dropout: The probability of leaving out a layer's whole change in training.
        use_effective_conv2d: Whether a kernel larger than 1 is a core of W₂, with factors of its first two dimensions.
        decompose_both: Whether W₁ is a product, too, where that is smaller.
        decompose_factor: The number of rows and of columns of W₁ where it divides those of the weight, else the most
            that they may be; -1 makes W₁ and W₂ as alike as they can be.
        rank_dropout_scale: Whether the rows that rank dropout keeps are divided by their share.
        init_weights: True: W₁, or A₁, is zero at first. ``"lycoris"``: W₂, or B₂, as in LyCORIS. False: none.
        rank_pattern: Other ranks, by regular expressions for the end of a path; the first that matches counts.
        alpha_pattern: Other α, by the same kind of patterns.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> config = LoKrConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), config)
        >>> {name: tuple(tensor.shape) for name, tensor in model[0].default.named_parameters()}
        {'lokr_w1': (8, 8), 'lokr_w2_a': (8, 2), 'lokr_w2_b': (2, 8)}
    """

    peft_type: ClassVar[PeftType] = PeftType.LOKR
    prefix: ClassVar[str | None] = "lokr_"

    decompose_both: bool = False
    decompose_factor: Annotated[int, Within("a whole number from -1 on", -1, 2**20)] = -1
    rank_dropout_scale: Editable[bool] = False
    init_weights: Editable[bool | Literal["lycoris"]] = True

    @property
    def starts_as_identity(self) -> bool:
        """Whether a factor is zero."""
        return self.init_weights is not False

    def rule_for(self, site: Any, dtype: torch.dtype) -> LoKr:
        """Returns the rule for a weight's kernel, or for a matrix."""
        return LoKr(rescales=self.rank_dropout_scale)
