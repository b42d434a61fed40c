"""LoRA at a convolution.

    y' = y + s · (B ∗ (A ∗ dropout(x)) + c)                  y = W ∗ x + b;  c: the bias of B, with `lora_bias` alone

A has the convolution's kernel, stride, padding and dilation and gives r features from all of its input; B has a kernel
of one position, and the convolution's groups. PEFT's A has no dilation and pads with zeros alone (its issue 3697).

    W' = W + s · B A            A of shape (r, in / groups, *kernel), B (out, r, 1, …)

is what there is for a rank that the groups don't divide, as for depthwise convolutions: it stays within the groups, so
it can be merged. PEFT refuses such ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphpeft.methods.lora.factors import rank_of
from graphpeft.methods.lora.init import initialisation
from graphpeft.methods.lora.rule import Combines, LoraBranchWithBias
from graphpeft.rules.parameter_spec import ParameterSpec, RankAxis
from graphpeft.rules.products import Product
from graphpeft.sites.site import Site, WeightLayout


@dataclass(frozen=True, kw_only=True)
class LoraOfKernels(LoraBranchWithBias, Combines):
    """The change of a convolution's kernels, as a matrix whose columns are the inputs at the kernel's positions.

    Attributes:
        layout: How the weight is stored.
    """

    layout: WeightLayout

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses dropout without an input, and initialisations of matrices."""
        return super().check(site, config) or initialisation.refusal_unless_random(config, "a convolution")

    def stored(self, product: Any) -> Any:
        """Returns the product's result as the weight is stored."""
        return self.layout.turned(product.unflatten(1, (-1, *self.layout.kernel)))

    def as_product(self, delta: Any) -> Any:
        """Returns a change of the weight as the matrix B A."""
        return self.layout.turned(delta).flatten(1)


@dataclass(frozen=True, kw_only=True)
class LoraConvolution(LoraOfKernels):
    """The branch of a convolution."""

    @property
    def transposed(self) -> bool:
        """Whether the convolution is a transposed one."""
        return self.layout.exchanged is not None

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, and the bias of B if there is one."""
        rank, kernel = rank_of(site, config), self.layout.kernel
        into: Any = site.in_features
        out: Any = site.out_features
        a_shape = (into, rank, *kernel) if self.transposed else (rank, into, *kernel)
        return {
            "lora_A": ParameterSpec(a_shape, key="lora_A.weight", rank=RankAxis(int(self.transposed), site.groups)),
            # which has the rank of one group only, since its rows are in groups
            "lora_B": ParameterSpec(
                (out, rank // site.groups, *(1 for _ in kernel)), key="lora_B.weight", rank=RankAxis(1)
            ),
            **self.bias_parameter(out),
        }

    def branch(self, h: Any, operation: Any, lora_A: Any, lora_B: Any, lora_bias: Any = None) -> Any:
        """Returns B ∗ (A ∗ h) + c."""
        return operation.pointwise(operation.apply(h, lora_A, groups=1), lora_B, lora_bias)

    def unmergeable(self, site: Site) -> str | None:
        """Refuses groups, across which the weight has no effect, and a bias of B where the operation adds none."""
        if site.groups == 1:
            return super().unmergeable(site)
        return f"its features are in {site.groups} groups, and LoRA's change of them goes across groups"

    def factored(self, lora_A: Any, lora_B: Any) -> Product:
        """Returns B A."""
        return Product((lora_B.flatten(1), (lora_A.transpose(0, 1) if self.transposed else lora_A).flatten(1)))


@dataclass(frozen=True, kw_only=True)
class LoraWithinGroups(LoraOfKernels):
    """The branch of a convolution in groups that don't divide the rank."""

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, and the bias of B if there is one."""
        rank, (out, inside, *kernel) = rank_of(site, config), site.matrix_shape
        return {
            "lora_A": ParameterSpec((rank, inside, *kernel), key="lora_A.weight", rank=RankAxis(0)),
            "lora_B": ParameterSpec((out, rank, *(1 for _ in kernel)), key="lora_B.weight", rank=RankAxis(1)),
            **self.bias_parameter(out),
        }

    def branch(self, h: Any, operation: Any, lora_A: Any, lora_B: Any, lora_bias: Any = None) -> Any:
        """Returns (B A) ∗ h + c."""
        changed = operation.apply(h, self.stored(self.factored(lora_A, lora_B).dense()))
        return changed if lora_bias is None else changed + operation.beside_outputs(lora_bias)

    def factored(self, lora_A: Any, lora_B: Any) -> Product:
        """Returns B A."""
        return Product((lora_B.flatten(1), lora_A.flatten(1)))


def lora_of_convolution(site: Site, config: Any, casts: bool) -> LoraConvolution | LoraWithinGroups:
    """Returns the rule for a convolution."""
    kind = LoraWithinGroups if rank_of(site, config) % site.groups else LoraConvolution
    drops = config.lora_dropout > 0
    return kind(layout=site.weight_layout, drops=drops, casts=casts, has_bias=config.lora_bias)
