"""LoRA at a convolution.

    y = W ∗ x + b + s · (B ∗ (A ∗ dropout(x)) + c)                  c: the bias of B, with `lora_bias` alone

A has the convolution's kernel, stride, padding and dilation and gives r features from all of its input; B has a kernel
of one position, and the convolution's groups. PEFT's A has no dilation and pads with zeros alone (its issue 3697).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.methods.lora import initialisation
from graphpeft.methods.lora.factors import (
    bias_change,
    bias_parameter,
    constants_of,
    draw,
    input_of,
    rank_of,
    refused_bias,
    refused_dropout,
    unmergeable_bias,
)
from graphpeft.rules.rule import Combines, Mergeable, OperationRule, ParameterSpec
from graphpeft.sites.site import Site


@dataclass(frozen=True)
class LoraConvolution(OperationRule, Mergeable, Combines):
    """The branch of a convolution.

    Attributes:
        transposed: Whether it is a transposed one.
        drops: Whether the branch has dropout.
        casts: Whether the dtype of A and B differs from the weight's.
        has_bias: Whether B has a bias.
    """

    transposed: bool
    drops: bool
    casts: bool
    has_bias: bool = False

    @property
    def rank_axes(self) -> tuple[int, int]:
        """The axes of A and B that are as long as the rank; that of B only has the rank of one group."""
        return (1 if self.transposed else 0), 1

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses a rank that the groups don't divide, dropout without an input, and initialisations of matrices."""
        rank = rank_of(site, config)
        if rank % site.groups:
            return (
                f"its features are in {site.groups} groups, which don't divide the rank {rank}; choose a multiple as r"
            )
        reason = refused_dropout(site, config) or refused_bias(site, config)
        return reason or initialisation.refused_unless_random(config, "a convolution")

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, and the bias of B if there is one."""
        rank, kernel = rank_of(site, config), site.shape[2:]
        if self.transposed:
            a_shape, out = (site.shape[0], rank, *kernel), site.shape[1] * site.groups
        else:
            a_shape, out = (rank, site.shape[1] * site.groups, *kernel), site.shape[0]
        factors = {
            "lora_A": ParameterSpec(a_shape, key="lora_A.weight"),
            "lora_B": ParameterSpec((out, rank // site.groups, *(1 for _ in kernel)), key="lora_B.weight"),
        }
        return {**factors, **bias_parameter(out)} if self.has_bias else factors

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the scale, and the probability of dropout if there is one."""
        return constants_of(site, config, self.drops)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and B as PEFT does."""
        draw(parameters, config.init_lora_weights, rank_of(site, config))

    def rewrite(
        self,
        x: Any,
        y: Any,
        operation: Any,
        lora_A: Any,
        lora_B: Any,
        *,
        lora_bias: Any = None,
        lora_scaling: Any,
        lora_dropout: Any = None,
        training: Any,
    ) -> Any:
        """Adds the branch to the operation's value."""
        h = self.input_of(x, lora_A, lora_dropout, training)
        result = add_scaled(y, self.branch(h, operation, lora_A, lora_B, lora_bias), lora_scaling)
        return result.to(y.dtype) if self.casts else result

    def input_of(self, x: Any, lora_A: Any, lora_dropout: Any, training: Any) -> Any:
        """Returns what the branch is given."""
        return input_of(x, lora_A, lora_dropout, training, self.drops, self.casts)

    def branch(self, h: Any, operation: Any, lora_A: Any, lora_B: Any, lora_bias: Any = None) -> Any:
        """Returns what A and B make of the branch's input, without the scale."""
        return operation.pointwise(operation.apply(h, lora_A, groups=1), lora_B, lora_bias)

    def unmergeable(self, site: Site) -> str | None:
        """Refuses groups, across which the branch has an effect that the weight can't have, and a bias without one."""
        if site.groups == 1:
            return unmergeable_bias(site, self.has_bias)
        return f"its features are in {site.groups} groups, and LoRA's change of them goes across groups"

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s B A, in the shape of the weight."""
        equation = "irk,or->iok" if self.transposed else "rik,or->oik"
        change = torch.einsum(equation, lora_A.flatten(2), lora_B.flatten(1))
        return change.unflatten(2, lora_A.shape[2:]) * lora_scaling

    def as_product(self, delta: Any) -> Any:
        """Returns a change of the weight as the matrix B A, whose columns are the inputs at the kernel's positions."""
        return (delta.transpose(0, 1) if self.transposed else delta).flatten(1)

    def bias_delta(self, lora_scaling: Any, lora_bias: Any = None) -> Any:
        """Returns s times the bias of B, if it has one."""
        return bias_change(lora_bias, lora_scaling)
