"""VeLoRA: LoRA that keeps a compressed input for its backward, so that A's gradient is an approximation.

    h Aᵀ in the forward                       ∂A ≈ s_v · gᵀ ĥ, ĥ = (P h) vᵀ        g: the gradient of h Aᵀ

P parts each token's features into groups and takes the product of each with v, a unit vector of the size of a group,
which is the mean of the groups of a batch, or random. In evaluation, and without gradients, it is LoRA. Source: Miles
et al., "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections", arXiv 2405.17991; the same numbers as
PEFT's ``tuners/lora/velora.py`` and ``VeloraLinearVariant`` in ``variants.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import as_node
from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.methods.lora.linear import LoraLinear
from graphpeft.methods.lora.variants.around import AroundLora
from graphpeft.rules.options import Size, Within, check_options
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.sites.site import Site


@dataclass
class VeloraConfig:
    """The options of VeLoRA; the names, defaults and meanings are PEFT's.

    Source: Miles et al., "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections", arXiv 2405.17991.

    Attributes:
        num_groups: The number of groups of a token's features.
        scale: The factor of A's gradient.
        init_type: The kind of vector: the mean of the groups of each batch, ``"batch_average"``, of the first one,
            ``"batch_average_once"``, or ``"random"``.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> config = LoraConfig(r=2, target_modules=["0"], velora_config=VeloraConfig(num_groups=4))
        >>> get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)[0].default.lora_velora_embed.shape
        torch.Size([2])
    """

    num_groups: Size = 64
    scale: Annotated[float, Within("positive and finite", 1e-30, 3.4e38)] = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Velora(AroundLora):
    """The branch of a linear layer with a compressed input.

    Attributes:
        groups: The number of groups of a token's features.
        scale: The factor of A's gradient.
        averages: When the vector is made of a batch: ``"always"``, ``"once"`` or ``"never"``.
    """

    groups: int
    scale: float
    averages: Literal["always", "once", "never"]

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A, B, the vector, and whether it has been made, which files don't say."""
        size = -(-site.weight_layout.turned_shape(site.shape)[1] // self.groups)
        embed = ParameterSpec((size,), "lora_velora_embed", is_trained=False)
        made = ParameterSpec((1,), "lora_velora_made", is_trained=False, is_saved=False, dtype=torch.uint8)
        return {**super().parameters(site, config), "lora_velora_embed": embed, "lora_velora_made": made}

    def initialise(
        self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, Tensor] | None:
        """Gives A and B the values that LoRA gives them, and draws the vector, or sets it to zero."""
        replacing = super().initialise(parameters, site, config, module)
        embed = parameters["lora_velora_embed"]
        embed.zero_()
        if self.averages == "never":
            # in the layer's dtype, as in PEFT
            embed.copy_(_unit(torch.randn(embed.shape, dtype=site.dtype)).to(site.dtype))
        parameters["lora_velora_made"].zero_()
        return replacing

    def rewrite(
        self,
        x: Any,
        y: Any,
        lora_A: Any,
        lora_B: Any,
        lora_velora_embed: Any,
        lora_velora_made: Any,
        lora_scaling: Any,
        training: Any,
        lora_bias: Any = None,
        lora_dropout: Any = None,
    ) -> Any:
        """Adds the branch to the operation's value."""
        h = self.lora.input_of(x, lora_A, lora_dropout, training)
        options = self.groups, self.scale, self.averages, training
        down: Any = as_node(_down, h, lora_A, lora_velora_embed, lora_velora_made, *options)
        result = add_scaled(y, F.linear(down, lora_B, lora_bias), lora_scaling)
        return result.to(y.dtype) if self.lora.casts else result

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s B A, or its transpose."""
        return self.lora.delta(lora_A, lora_B, lora_scaling)


def of_options(lora: LoraLinear, options: VeloraConfig) -> Velora:
    """Returns the rule of VeLoRA."""
    averages: Any = {"batch_average": "always", "batch_average_once": "once", "random": "never"}[options.init_type]
    return Velora(lora, options.num_groups, options.scale, averages)


def _down(
    h: Tensor, A: Tensor, embed: Tensor, made: Tensor, groups: int, scale: float, averages: str, training: bool
) -> Tensor:
    """Returns h Aᵀ, in training with the compressed input for A's gradient."""
    if not training or not torch.is_grad_enabled():
        return F.linear(h, A)
    if averages != "never":
        _average(h, embed, made, groups, averages == "once")
    # the vector of a later call is another one
    return _Compressed.apply(h, A, embed.to(h.dtype, copy=True), groups, scale)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def _average(h: Tensor, embed: Tensor, made: Tensor, groups: int, is_once: bool) -> None:
    """Writes the mean of a batch's groups into the vector."""
    mean = _unit(_grouped(h.detach(), groups).flatten(0, 1).mean(0)).to(embed.dtype)
    embed.copy_(torch.where(made.bool(), embed, mean) if is_once else mean)
    made.fill_(1)


def _grouped(h: Tensor, groups: int) -> Tensor:
    """Returns the features of each token in groups, (tokens, groups, size), with zeros behind them."""
    size = -(-h.shape[-1] // groups)
    return F.pad(h, (0, groups * size - h.shape[-1])).reshape(-1, groups, size)


def _unit(vector: Tensor) -> Tensor:
    """Returns a vector in length one and in single precision; of a zero one, that of equal elements."""
    vector = vector.float()
    vector = torch.where(vector.any(), vector, torch.ones_like(vector))
    return vector / torch.linalg.vector_norm(vector)


class _Compressed(torch.autograd.Function):
    """h Aᵀ, which keeps of h its products with a vector alone."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, A: Tensor, embed: Tensor, groups: int, scale: float) -> Tensor:
        """Returns h Aᵀ, and keeps the compressed input."""
        ctx.save_for_backward(_grouped(h, groups) @ embed, A, embed)
        ctx.shape, ctx.dtype, ctx.scale = h.shape, h.dtype, scale
        return F.linear(h, A)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Returns the gradients of h, which is exact, and of A."""
        (gradient,) = gradients
        compressed, A, embed = ctx.saved_tensors
        of_h = of_a = None
        if ctx.needs_input_grad[0]:
            of_h = (gradient @ A.to(gradient.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            restored = (compressed.unsqueeze(-1) * embed).flatten(1)[:, : ctx.shape[-1]] * ctx.scale
            of_a = (gradient.reshape(-1, gradient.shape[-1]).mT @ restored.to(gradient.dtype)).to(A.dtype)
        return of_h, of_a, None, None, None
