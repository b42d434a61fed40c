"""RandLoRA: a change of full rank, as a sum of frozen random products of low rank, each with trained scales.

    ΔW = (α/r) Σₙ Bₙ diag(λₙ) A diag(γₙ)        A (r, small), Bₙ (large, r), λₙ (r), γₙ (small), for ⌈small / r⌉ n

`small` and `large` are the smaller and the larger of a weight's two sizes; where out < in, ΔW is the transpose. All
layers share A and B, cut to their sizes. As in PEFT, the rows of the λₙ A γₙ, sorted by A's rows, are paired with the
columns of the Bₙ, sorted by n.

Source: Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv 2502.00987; the same
numbers as PEFT's ``tuners/randlora/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft._torch import is_transformed
from graphpeft.graph.recorded import recorded
from graphpeft.graph.scaled_sum import is_captured
from graphpeft.methods.factored import Factored, ProjectedConfig, sizes_of
from graphpeft.rules.options import InitWeights, InputDropout, Number, Size, TrainedBiases
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Product
from graphpeft.rules.registry import register


@dataclass(frozen=True, kw_only=True)
class RandLora(Factored):
    """The change of a weight.

    Attributes:
        terms: The number of terms.
    """

    terms: int

    scales: ClassVar[tuple[str, ...]] = ("scale",)

    @property
    def small(self) -> int:
        """The smaller size of the weight."""
        return min(self.sizes.rows, self.sizes.columns)

    @property
    def large(self) -> int:
        """The larger size of the weight."""
        return max(self.sizes.rows, self.sizes.columns)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, which all sites share, and λ and γ."""
        small, large = sorted(config.largest)
        stack, r = self.sizes.stack, config.r
        return {
            "randlora_A": config.projection((r, 1, small), "randlora_A", copied=True),
            "randlora_B": config.projection((large, math.ceil(small / r), r), "randlora_B", copied=True),
            "randlora_lambda": ParameterSpec((*stack, r, self.terms), "randlora_lambda"),
            "randlora_gamma": ParameterSpec((*stack, self.terms, self.small), "randlora_gamma"),
        }

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and B by the config's seed; λ is 0, or drawn, and γ is one number."""
        if config.draws(site):
            generator = torch.Generator().manual_seed(config.projection_prng_key)
            for name in ("randlora_A", "randlora_B"):
                drawn = _drawn(parameters[name].shape, generator, config.share)
                parameters[name].copy_(drawn / drawn.std())
        scale, gamma = parameters["randlora_lambda"], parameters["randlora_gamma"]
        # PEFT draws λ in any case
        scale.normal_()
        gamma.fill_(1 / self.large)
        if config.init_weights:
            scale.zero_()
            gamma.fill_(1 / max(gamma.shape[-2:]))

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns α/r."""
        return {"scale": config.randlora_alpha / config.r}

    def product(
        self, randlora_gamma: Any, randlora_lambda: Any, randlora_A: Any, randlora_B: Any, scale: Any
    ) -> Product:
        """Returns the sum of all terms, as factors of (…, terms · r, columns) and (…, rows, terms · r)."""
        down = scaled_bases(randlora_A[:, :, : self.small], randlora_lambda, randlora_gamma).flatten(-3, -2)
        up = randlora_B[: self.large, : self.terms].flatten(1)
        return Product((up, down) if self.small == self.sizes.columns else (down.mT, up.mT), scale)


@recorded
def scaled_bases(base: Tensor, scale: Tensor, gamma: Tensor) -> Tensor:
    """Returns diag(λₙ) A diag(γₙ) for each n, and saves only the three for the backward, as PEFT does.

    Args:
        base: A, of shape (r, 1, small), which has no gradient.
        scale: λ, of shape (…, r, n).
        gamma: γ, of shape (…, n, small).

    Returns:
        A tensor of shape (…, r, n, small).
    """
    # compilers choose themselves what to save; torch.func has no rule for a Function
    if is_captured() or is_transformed():
        return _scaled(base, scale, gamma)
    made: Any = _ScaledBases.apply(base, scale, gamma)
    return made


def _scaled(base: Tensor, scale: Tensor, gamma: Tensor) -> Tensor:
    return scale[..., None] * base * gamma[..., None, :, :]


class _ScaledBases(torch.autograd.Function):
    """The product with a backward of differentiable operations, so that higher-order gradients work."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, scale: Tensor, gamma: Tensor) -> Tensor:
        """Returns the product."""
        ctx.save_for_backward(base, scale, gamma)
        return _scaled(base, scale, gamma)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of λ and γ."""
        base, scale, gamma = ctx.saved_tensors
        of_bases = gradients[0] * base
        of_scale = torch.einsum("...kns,...ns->...kn", of_bases, gamma)
        return None, of_scale, torch.einsum("...kns,...kn->...ns", of_bases, scale)


def _drawn(shape: torch.Size, generator: torch.Generator, share: float | None) -> Tensor:
    """Returns a random projection as PEFT draws it: in bfloat16 and term by term, or −1 and 1 at a share of the places.

    Args:
        shape: The projection's: (rows, terms, columns).
        generator: Draws the numbers.
        share: The share of −1, and that of 1; None for numbers that aren't sparse.
    """
    if share is not None:
        uniform = torch.rand(shape, generator=generator)
        return (uniform > 1 - share).float() - (uniform < share).float()
    rows, terms, columns = shape
    drawn = [torch.empty(rows, 1, columns, dtype=torch.bfloat16) for _ in range(terms)]
    for part in drawn:
        nn.init.kaiming_uniform_(part, a=5**0.5, generator=generator)
    return torch.cat(drawn, dim=1)


@register
@dataclass(kw_only=True)
class RandLoraConfig(ProjectedConfig):
    """The options of RandLoRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv 2502.00987.

    Differs from PEFT: the projections are drawn in bfloat16 on every machine, while PEFT draws them in float16 where
    PyTorch has no bfloat16. And each adapter has projections of the size of its own largest weights. In PEFT, further
    adapters of a model have those of the first one, and fail if these are too small.

    Attributes:
        r: The rank of each term; the smaller it is, the more terms there are, and the more is trained.
        projection_prng_key: The seed of the projections; the same for all adapters of a model.
        save_projection: Whether files have the projections: once, and a copy with each layer, as PEFT writes them;
            files without copies are read, too. If not, they are drawn again when a file is loaded, by a generator that
            may draw other numbers in another version of PyTorch. The same for all adapters of a model.
        sparse: Whether the projections have −1 and 1 at a sixth of their places each, and 0 elsewhere.
        very_sparse: Whether they have them at a share of 1 / (2 √small) each, by the smaller of the largest sizes.
        randlora_dropout: The probability of dropping an element of the branch's input in training.
        randlora_alpha: α; the scale is α/r.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"randlora_only"``, the adapted layers'.
        init_weights: Whether λ is 0 at first; if False, it is drawn.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), RandLoraConfig(r=3, target_modules=["0"]))
        >>> {name: tuple(tensor.shape) for name, tensor in model[0].default.named_parameters() if tensor.requires_grad}
        {'randlora_lambda': (3, 3), 'randlora_gamma': (3, 8)}
    """

    peft_type: ClassVar[PeftType] = PeftType.RANDLORA
    prefix: ClassVar[str | None] = "randlora_"

    r: Size = 32
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: InputDropout = 0.0
    randlora_alpha: Number = 640
    bias: TrainedBiases[Literal["none", "all", "randlora_only"]] = "none"
    init_weights: InitWeights = True

    @property
    def share(self) -> float | None:
        """The share of −1 in the projections, and that of 1; None if they aren't sparse."""
        if self.very_sparse:
            return 1 / (2 * math.sqrt(min(self.largest)))
        return 1 / 6 if self.sparse else None

    def rule_for(self, site: Any, dtype: torch.dtype) -> RandLora:
        """Returns the rule for a linear operation, for a call, or for a weight."""
        sizes = sizes_of(site)
        return RandLora(sizes=sizes, terms=math.ceil(min(sizes.rows, sizes.columns) / self.r))
