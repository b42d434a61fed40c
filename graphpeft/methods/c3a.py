"""C³A: a change of a weight that consists of circulant blocks, of which each is made of one row.

    ΔWᵢⱼ = C(kᵢⱼ) / in        C(k): row 0 is k, and each row is the one before, moved on by one place
    yᵢ' = yᵢ + Σⱼ F⁻¹(F(xⱼ) ⊙ conj F(kᵢⱼ)) / in

Source: Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", arXiv 2407.19342; the same numbers as
PEFT's ``tuners/c3a/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft._torch import is_transformed
from graphpeft.graph.recorded import recorded
from graphpeft.graph.scaled_sum import is_captured
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.matrices import matrices_of
from graphpeft.rules.delta_rule import ProductRule
from graphpeft.rules.options import Editable, Size, TargetOptions, TrainedBiases
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Factor, Product
from graphpeft.rules.registry import register
from graphpeft.targeting import pattern_values, targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class C3A(ProductRule):
    """The change at one weight."""

    needs_matrix: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses blocks that don't fit."""
        reason = super().check(site, config)
        if reason is not None:
            return reason
        size, (_, rows, columns) = config.block_size_at(site), matrices_of(site)
        if rows % size or columns % size:
            common = math.gcd(rows, columns)
            return (
                f"block_size={size} doesn't divide both sides of its {site.attribute}, {rows}×{columns}; choose a "
                f"divisor of {common}, or give this layer one by block_size_pattern"
            )
        return None

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the rows of all blocks."""
        size, (stack, rows, columns) = config.block_size_at(site), matrices_of(site)
        return {"c3a_kernel": ParameterSpec((*stack, rows // size, columns // size, size), key="c3a_kernel")}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws the rows, or sets them to zero."""
        kernel, (_, rows, columns) = parameters["c3a_kernel"], matrices_of(site)
        if config.init_weights is True:
            kernel.zero_()
        elif config.init_weights == "gaussian":
            kernel.normal_()
        else:
            bound = math.sqrt(1 / columns if config.init_weights == "kaiming_uniform" else 6 / (rows + columns))
            kernel.uniform_(-bound, bound)

    def product(self, c3a_kernel: Any) -> Product:
        """Returns ΔW as one factor."""
        return Product((_Circulant(c3a_kernel),))


@dataclass(frozen=True)
class _Circulant(Factor):
    """Circulant blocks, by their rows."""

    kernel: Any

    def applied(self, h: Any) -> Any:
        """Returns the circular convolutions of the input."""
        return convolved(h, self.kernel)

    def matrix(self) -> Any:
        """Returns the matrix of all blocks."""
        return circulant(self.kernel)


@recorded
def convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Returns the product of an input with the change of a weight.

    Args:
        x: The input, (…, in).
        kernel: The rows of all blocks, (out / b, in / b, b).
    """
    if torch.compiler.is_exporting():
        # formats for other runtimes have no complex numbers
        return nn.functional.linear(x, circulant(kernel))
    if not x.numel():
        # some builds of PyTorch have no transforms of empty batches
        return nn.functional.linear(x.to(kernel.dtype), circulant(kernel)).to(x.dtype)
    # compilers choose themselves what to save; torch.func has no rule for a Function
    if is_captured() or is_transformed():
        return _convolved(x, kernel)
    made: Any = _Convolution.apply(x, kernel)
    return made


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    inputs, blocks, size = *_transforms(x, kernel), kernel.shape[-1]
    made = torch.fft.irfft(torch.einsum("...jf,ijf->...if", inputs, blocks.conj()), n=size)
    return made.flatten(-2).to(x.dtype)


def _transforms(x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the transforms of an input's blocks, (…, in / b, b / 2 + 1), and of the rows by the inputs' number."""
    # there is no transform in half precision
    dtype = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    inputs = torch.fft.rfft(x.to(dtype).unflatten(-1, (-1, kernel.shape[-1])))
    return inputs, torch.fft.rfft(kernel.to(dtype) / x.shape[-1])


class _Convolution(torch.autograd.Function):
    """Saves the input and the rows alone for the backward, as PEFT does; that can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        """Returns the product."""
        ctx.save_for_backward(x, kernel)
        return _convolved(x, kernel)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of the input and of the rows."""
        x, kernel = ctx.saved_tensors
        # by reshape and products of matrices alone, which have rules for gradients in batches
        inputs, blocks, size = *_transforms(x, kernel), kernel.shape[-1]
        dtype, rows = inputs.real.dtype, kernel.shape[0]
        outputs = torch.fft.rfft(gradients[0].to(dtype).reshape(-1, rows, size)).permute(2, 0, 1)
        of_inputs = (outputs @ blocks.permute(2, 0, 1)).permute(1, 2, 0)
        inputs = inputs.reshape(-1, *inputs.shape[-2:]).permute(2, 0, 1)
        of_rows = (outputs.conj().mT @ inputs).permute(1, 2, 0) / x.shape[-1]
        of_x = torch.fft.irfft(of_inputs, n=size).reshape(x.shape)
        return of_x.to(x.dtype), torch.fft.irfft(of_rows, n=size).to(kernel.dtype)


@recorded
def circulant(kernel: Tensor) -> Tensor:
    """Returns the matrices of circulant blocks, (…, out, in), divided by their number of columns.

    Args:
        kernel: The rows of all blocks, (…, out / b, in / b, b).
    """
    size = kernel.shape[-1]
    places = torch.arange(size, device=kernel.device)
    blocks = kernel[..., (places - places[:, None]) % size]
    return blocks.transpose(-2, -3).flatten(-2).flatten(-3, -2) / (kernel.shape[-2] * size)


@register
@dataclass(kw_only=True)
class C3AConfig(TargetedConfig):
    """The options of C³A beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", arXiv 2407.19342.

    Differs from PEFT: two active adapters add up, as they do when they are merged. In PEFT the second one is given the
    output of the first in place of the layer's input.

    Attributes:
        block_size: The size of the blocks, which divides the inputs and the outputs of each layer.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"c3a_only"``, the adapted layers'.
        block_size_pattern: Other sizes, by regular expressions for what is behind a dot of a path, or by whole paths;
            the first that matches counts.
        init_weights: The distribution of the first values, or True for zeros; False is ``"xavier_uniform"``.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), C3AConfig(block_size=4, target_modules=["0"]))
        >>> model[0].default.c3a_kernel.shape
        torch.Size([4, 2, 4])
    """

    peft_type: ClassVar[PeftType] = PeftType.C3A
    prefix: ClassVar[str | None] = "c3a_"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    default_targets: ClassVar[targets.Defaults] = {
        **DEFAULT_TARGET_MODULES,
        "gpt2": ("mlp.c_proj",),
        "gpt_bigcode": ("mlp.c_proj",),
    }

    block_size: Size = 256
    bias: TrainedBiases[Literal["none", "all", "c3a_only"]] = "none"
    block_size_pattern: dict[str, Size] | None = field(default_factory=dict)
    init_weights: Editable[bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"]] = "xavier_uniform"

    @property
    def starts_as_identity(self) -> bool:
        """Whether the rows are zero."""
        return self.init_weights is True

    @property
    def target_options(self) -> TargetOptions:
        """The options that name modules, and those with patterns for their names."""
        patterns = {"block_size_pattern": self.block_size_pattern or {}}
        return super().target_options._replace(patterns=patterns)

    def block_size_at(self, site: Any) -> int:
        """Returns the size of the blocks at a site.

        Args:
            site: The site.
        """
        patterns, size = self.block_size_pattern, self.block_size
        return pattern_values.value_below(patterns, site.name, size, "block_size_pattern") if patterns else size

    def rule_for(self, site: Any, dtype: torch.dtype) -> C3A:
        """Returns the rule for a weight's shape."""
        return C3A()
