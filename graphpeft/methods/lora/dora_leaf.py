"""DoRA at the call of a layer whose weight W is quantised.

    W' = m · (W + s B A) / n            n = ‖W + s B A‖, for each output feature;  W = Q⁻¹(codes)
    y' = y + (m/n − 1) · (y − b) + (m/n) · s · branch(x)

It is DoRA, see ``dora.py``, with numbers that are decoded in each call. Where the branch has dropout, y − b is computed
anew in training, from what dropout has left of x. The same numbers as PEFT's ``tuners/lora/bnb.py`` and ``dora.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import as_node
from graphpeft.methods.lora.factors import scaling_of
from graphpeft.methods.lora.linear import LoraLeaf
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import Mergeable, OperationRule
from graphpeft.sites import quantisers
from graphpeft.sites.site import LeafSite


@dataclass(frozen=True)
class DoraLeaf(OperationRule, Mergeable):
    """The change of a quantised weight in direction and in length.

    Attributes:
        direction: The rule of LoRA for the same site.
    """

    direction: LoraLeaf

    def check(self, site: LeafSite, config: Any) -> str | None:
        """Refuses the same as LoRA."""
        return self.direction.check(site, config)

    def parameters(self, site: LeafSite, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A, B and the magnitudes."""
        magnitude = ParameterSpec((site.out_features,), key="lora_magnitude_vector")
        return {**self.direction.parameters(site, config), "lora_magnitude": magnitude}

    def constants(self, site: LeafSite, config: Any) -> Mapping[str, float]:
        """Returns the constants of LoRA."""
        return self.direction.constants(site, config)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Gives A and B the values that PEFT gives them, and takes the lengths as magnitudes."""
        factors = {name: tensor for name, tensor in parameters.items() if name != "lora_magnitude"}
        self.direction.initialise(factors, site, config, module)
        weight = quantisers.codes_of(module).numbers()
        A, B = (factors[name].to(weight.device) for name in ("lora_A", "lora_B"))
        lengths = _lengths(weight, self.direction.delta(A, B, scaling_of(site, config)))
        parameters["lora_magnitude"].copy_(lengths.view(-1))

    def rewrite(
        self,
        x: Any,
        y: Any,
        codes: Any,
        lora_A: Any,
        lora_B: Any,
        *,
        state: Any = None,
        bias: Any = None,
        lora_magnitude: Any,
        lora_scaling: Any,
        lora_dropout: Any = None,
        training: Any,
    ) -> Any:
        """Scales the call's value without its bias, and adds the scaled branch."""
        h = self.direction.input_of(x, lora_A, lora_dropout, training)
        weight = as_node(quantisers.numbers_of, codes, state).to(lora_A.dtype)
        ratio = self._ratio(weight, lora_A, lora_B, lora_magnitude, lora_scaling).view(-1)
        plain = y if bias is None else y - bias
        if self.direction.drops:
            plain = as_node(_anew_if, plain, training, h, weight)
        branch = self.direction.factored(lora_A, lora_B).unscaled(h)
        return (y + ((ratio - 1) * plain + ratio * branch * lora_scaling)).to(y.dtype)

    def delta(self, weight: Any, base: Any, lora_A: Any, lora_B: Any, lora_magnitude: Any, lora_scaling: Any) -> Any:
        """Returns W' − W; changes of W by adapters before are scaled with it."""
        ratio = self._ratio(base, lora_A, lora_B, lora_magnitude, lora_scaling)
        return ratio * (weight + self.direction.delta(lora_A, lora_B, lora_scaling)) - weight

    def _ratio(self, weight: Any, lora_A: Any, lora_B: Any, lora_magnitude: Any, lora_scaling: Any) -> Any:
        """Returns m/n, (out, 1)."""
        lengths = _lengths(weight, self.direction.delta(lora_A, lora_B, lora_scaling)).detach()
        return lora_magnitude.view(-1, 1) / lengths


def _lengths(weight: Any, change: Any) -> Any:
    """Returns the lengths of the rows of the changed weight, (out, 1)."""
    return torch.linalg.vector_norm(weight + change, dim=1, keepdim=True)


def _anew_if(plain: Tensor, training: bool, h: Tensor, weight: Tensor) -> Tensor:
    """Returns the value of the layer without its bias, for an input that dropout may have changed."""
    return F.linear(h, weight) if training else plain
