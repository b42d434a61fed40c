"""LoHa: the change of a weight is the elementwise product of two products of low rank, so that its rank is up to r².

    ΔW = (α/r) · (A₁ B₁) ⊙ (A₂ B₂)        W (out, in): A (out, r), B (r, in), or (r, in · kernel) of a convolution
    Aᵢᵀ (Tᵢ ×₂ Bᵢ) for Aᵢ Bᵢ              with `use_effective_conv2d`: T (r, r, *kernel), A (r, out), B (r, in)

Source: Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", arXiv
2108.06098; the same numbers as PEFT's ``tuners/loha/layer.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft._torch import is_transformed
from graphpeft.graph.recorded import recorded
from graphpeft.graph.scaled_sum import is_captured
from graphpeft.methods.lycoris import LycorisConfig, LycorisRule, core_product, core_shape, draw
from graphpeft.rules.options import InitWeights
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register


@dataclass(frozen=True, kw_only=True)
class LoHa(LycorisRule):
    """The change at one weight.

    Attributes:
        has_cores: Whether each product is a core with factors of its first two dimensions.
    """

    has_cores: bool = False

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the factors of both products, in the order in which PEFT draws them, and their cores."""
        rank, shape = config.value_at("r", site), site.matrix_shape
        if self.has_cores:
            shapes = {"a": (rank, shape[0]), "b": (rank, shape[1])}
        else:
            *stack, rows, columns = shape[: len(shape) - len(self.layout.kernel)]
            shapes = {"a": (*stack, rows, rank), "b": (*stack, rank, columns * math.prod(self.layout.kernel))}
        names = {f"hada_w{n}_{side}": made for n in (1, 2) for side, made in shapes.items()}
        if self.has_cores:
            names |= dict.fromkeys(("hada_t1", "hada_t2"), core_shape(rank, self.layout.kernel))
        return {name: ParameterSpec(made, key=name) for name, made in names.items()}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws all but B₂, which is zero, or all."""
        for name, tensor in parameters.items():
            if name == "hada_w2_b" and config.init_weights:
                tensor.zero_()
            else:
                draw(tensor, site)

    def delta(
        self,
        hada_w1_a: Any,
        hada_w1_b: Any,
        hada_w2_a: Any,
        hada_w2_b: Any,
        scale: Any,
        hada_t1: Any = None,
        hada_t2: Any = None,
    ) -> Any:
        """Returns ΔW."""
        first, second = (hada_w1_a, hada_w1_b), (hada_w2_a, hada_w2_b)
        if self.has_cores:
            first, second = core_product(*first, hada_t1), core_product(*second, hada_t2)
        change = hadamard(*first, *second) * scale
        return self.shaped(change)


@recorded
def hadamard(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Returns (a b) ⊙ (c d), and saves only the factors for the backward, as PEFT does.

    Args:
        a: Of shape (…, out, r).
        b: Of shape (…, r, in).
        c: As a.
        d: As b.
    """
    # compilers choose themselves what to save; torch.func has no rule for a Function
    if is_captured() or is_transformed():
        return (a @ b) * (c @ d)
    made: Any = _Hadamard.apply(a, b, c, d)
    return made


class _Hadamard(torch.autograd.Function):
    """The product with a backward of differentiable operations, so that higher-order gradients work."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """Returns the product."""
        ctx.save_for_backward(a, b, c, d)
        return (a @ b) * (c @ d)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of the factors."""
        saved = ctx.saved_tensors  # once, since checkpointing hands them out once
        # under autocast, a core's product is of another dtype than its factors
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in saved))
        a, b, c, d = (tensor.to(dtype) for tensor in saved)
        of_first, of_second = gradients[0] * (c @ d), gradients[0] * (a @ b)
        return of_first @ b.mT, a.mT @ of_first, of_second @ d.mT, c.mT @ of_second


@register
@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """The options of LoHa beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", arXiv
    2108.06098.

    Attributes:
        r: The rank of both products; that of their elementwise product is up to its square.
        alpha: α; the scale is α/r.
        rank_dropout: The probability of dropping a row of ΔW in training; what remains is divided by its share.
        module_dropout: The probability of leaving out a layer's whole change in training.
        use_effective_conv2d: Whether a kernel larger than 1 is a core of each product, with factors of its first two
            dimensions.
        init_weights: Whether B₂ is zero at first; if False, it is drawn like the others.
        rank_pattern: Other ranks, by regular expressions for the end of a path; the first that matches counts.
        alpha_pattern: Other α, by the same kind of patterns.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> config = LoHaConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> model[0].default.hada_w1_a.shape, model[0].default.hada_w1_b.shape
        (torch.Size([16, 2]), torch.Size([2, 8]))
    """

    peft_type: ClassVar[PeftType] = PeftType.LOHA
    prefix: ClassVar[str | None] = "hada_"

    init_weights: InitWeights = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> LoHa:
        """Returns the rule for a weight's kernel, or for a matrix."""
        has_cores = self.use_effective_conv2d and any(size != 1 for size in site.kernel)
        return LoHa(rescales=True, has_cores=has_cores)
