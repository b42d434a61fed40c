"""DoRA: LoRA gives the direction of a weight, and a vector of its own the length.

    W' = m · (W + s B A) / n            n = ‖W + s B A‖, for each output feature
    y' = y + (m/n − 1) · (y − b) + (m/n) · s · branch(x)

m, the magnitudes, start as n; n gets no gradient. Where the branch has dropout, y − b is computed anew in training,
from what dropout has left of x. In single precision a fresh adapter is the identity, bit for bit: m and n come from the
same values by the same operation, so that m/n is one. On weights of half precision m is rounded as in PEFT, whose
values it has, and m/n is one within that rounding. Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation",
arXiv 2402.09353; the same numbers as PEFT's ``tuners/lora/dora.py`` and ``variants.py``. PEFT has no DoRA for
parameters that aren't a layer's, nor for transposed convolutions. Of a convolution whose features are in groups, where
B A isn't of the weight's shape, it takes the lengths with (B A), in as many rows as B has, in that shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.computed_weights import read_weight
from graphpeft.methods.lora.convolution import LoraConvolution, LoraWithinGroups
from graphpeft.methods.lora.factors import scaling_of
from graphpeft.methods.lora.init.initialisation import traits_of
from graphpeft.methods.lora.kernels import LoraKernels
from graphpeft.methods.lora.matrix import LoraExperts, LoraMatrix
from graphpeft.methods.lora.rule import LoraBranch, dropout_refusal
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import Mergeable, OperationRule
from graphpeft.sites.site import Site

Lora = LoraMatrix | LoraConvolution | LoraWithinGroups | LoraExperts | LoraKernels
"""The rules that DoRA extends; rules of linear operations and embeddings are each a `LoraMatrix`."""


@dataclass(frozen=True)
class Dora(OperationRule, Mergeable):
    """The change of a weight in direction and in length.

    Attributes:
        direction: The rule of LoRA for the same site.
        lengthwise: The dimensions of the weight, as it is stored, that a length is over; the others are features.
        is_product: Whether an operation that multiplies by the weight as it is stored has the features as its outputs.
        positions: How many dimensions the operation's value has behind its features.
        across_groups: Whether it is of a convolution, and LoRA's change goes across the groups of its features.
    """

    adapts_both_ways: ClassVar[bool] = True
    scales: ClassVar[tuple[str, ...]] = ("lora_scaling",)

    direction: Lora
    lengthwise: tuple[int, ...]
    is_product: bool
    positions: int = 0
    across_groups: bool = False

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses the same as LoRA, dropout where the weight as such is changed, and transposed convolutions in groups.

        Their features are in two dimensions.
        """
        reason = dropout_refusal(site, config) or self.direction.check(site, config)
        if reason is None and site.groups != 1 and site.transposed:
            return f"its features are in {site.groups} groups, and use_dora=True isn't for a transposed one's"
        return reason

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A, B and the magnitudes."""
        features = tuple(size for dim, size in enumerate(site.shape) if dim not in self.lengthwise)
        # PEFT keeps a convolution's as they multiply its outputs
        shape = (1, *features, *(1,) * self.positions) if self.positions else features
        magnitude = ParameterSpec(shape, key="lora_magnitude_vector")
        return {**self.direction.parameters(site, config), "lora_magnitude": magnitude}

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the constants of LoRA."""
        return self.direction.constants(site, config)

    def replaces(self, site: Site, config: Any) -> bool:
        """Returns whether the initialisation replaces the weight."""
        return traits_of(config).replaces_weight

    def initialise(
        self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, Tensor] | None:
        """Gives A and B the values that PEFT gives them, and takes the lengths as magnitudes."""
        factors = {name: tensor for name, tensor in parameters.items() if name != "lora_magnitude"}
        replacing = self.direction.initialise(factors, site, config, module)
        own = read_weight(module, site.attribute)
        assert own is not None
        weight = own.detach() if replacing is None else replacing[site.attribute].to(own.dtype)
        A, B = (factors[name].to(weight.device, weight.dtype) for name in ("lora_A", "lora_B"))
        lengths = self._lengths(weight, A, B, scaling_of(site, config))
        parameters["lora_magnitude"].copy_(lengths.view(parameters["lora_magnitude"].shape))
        return replacing

    def rewrite(
        self,
        x: Any,
        y: Any,
        weight: Any,
        base: Any,
        bias: Any,
        operation: Any,
        lora_A: Any,
        lora_B: Any,
        *,
        lora_magnitude: Any,
        lora_scaling: Any,
        lora_dropout: Any = None,
        training: Any,
    ) -> Any:
        """Scales the operation's value without its bias, and adds the scaled branch."""
        assert isinstance(self.direction, LoraBranch)  # others have no operation
        casts, drops = self.direction.casts, self.direction.drops
        h = self.direction.input_of(x, lora_A, lora_dropout, training)
        if operation.transposed != self.is_product:
            # the lengths are over its outputs
            change = self.delta(weight, base, lora_A, lora_B, lora_magnitude, lora_scaling)
            result = y + operation.apply(h, change)
            return result.to(y.dtype) if casts else result
        ratio = self._ratio(base, lora_A, lora_B, lora_magnitude, lora_scaling)
        ratio = ratio.reshape(-1, *(1,) * self.positions)
        plain = y if bias is None else y - bias.reshape(-1, *(1,) * self.positions)
        if drops:
            plain = operation.apply_if(training, plain, h, weight.to(lora_A.dtype) if casts else weight)
        branch = self.direction.branch(h, operation, lora_A, lora_B)
        result = y + ((ratio - 1) * plain + ratio * branch * lora_scaling)
        return result.to(y.dtype) if casts else result

    def unmergeable(self, site: Site) -> str | None:
        """Refuses the same as LoRA."""
        return self.direction.unmergeable(site)

    def delta(self, weight: Any, base: Any, lora_A: Any, lora_B: Any, lora_magnitude: Any, lora_scaling: Any) -> Any:
        """Returns W' − W; changes of W by adapters before are scaled with it."""
        ratio = self._ratio(base, lora_A, lora_B, lora_magnitude, lora_scaling)
        return ratio * (weight + self.direction.delta(lora_A, lora_B, lora_scaling)) - weight

    def _ratio(self, weight: Any, lora_A: Any, lora_B: Any, lora_magnitude: Any, lora_scaling: Any) -> Any:
        """Returns m/n, in a shape that goes with the weight."""
        lengths = self._lengths(weight, lora_A, lora_B, lora_scaling).detach()
        return lora_magnitude.view(lengths.shape) / lengths

    def _lengths(self, weight: Any, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns the lengths of the changed weight, in a shape that goes with it."""
        if self.across_groups:
            rank = lora_A.shape[0]
            change = (lora_B.reshape(-1, rank) @ lora_A.reshape(rank, -1)).reshape(weight.shape) * lora_scaling
        else:
            change = self.direction.delta(lora_A, lora_B, lora_scaling)
        return torch.linalg.vector_norm(weight + change, dim=self.lengthwise, keepdim=True)


def with_magnitudes(direction: Lora, site: Site) -> Dora:
    """Returns the rule of DoRA for a site."""
    dimensions = range(len(site.shape))
    if site.layout is ops.Embedding:
        return Dora(direction, lengthwise=(0,), is_product=False)
    if site.layout is ops.Convolution:
        features = int(site.transposed)
        lengthwise = tuple(dim for dim in dimensions if dim != features)
        across = site.groups != 1 and isinstance(direction, LoraConvolution)
        return Dora(direction, lengthwise, site.transposed, positions=len(site.shape) - 2, across_groups=across)
    # of a matrix, or of each in a stack
    return Dora(direction, (len(site.shape) - (2 if site.transposed else 1),), is_product=site.transposed)
