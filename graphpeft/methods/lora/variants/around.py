"""The base class of variants that are LoRA in all that they don't say.

y' = y + s · branch(…)        with LoRA's own rule for the same site, on other factors or with another gradient
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from graphpeft.methods.lora.linear import LoraLinear
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import Mergeable, OperationRule
from graphpeft.sites.site import Site


@dataclass(frozen=True)
class AroundLora(OperationRule, Mergeable):
    """A variant of a linear layer's branch.

    Attributes:
        lora: LoRA's rule for the same site.
    """

    scales: ClassVar[tuple[str, ...]] = ("lora_scaling",)

    lora: LoraLinear

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses the same as LoRA."""
        return self.lora.check(site, config)

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, and the bias of B if there is one."""
        return self.lora.parameters(site, config)

    def constants(self, site: Site, config: Any) -> Mapping[str, float]:
        """Returns the constants of LoRA."""
        return self.lora.constants(site, config)

    def replaces(self, site: Site, config: Any) -> bool:
        """Returns whether the initialisation replaces the weight."""
        return self.lora.replaces(site, config)

    def initialise(
        self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, Tensor] | None:
        """Gives A and B the values that LoRA gives them."""
        of_lora = {name: parameters[name] for name in self.lora.parameters(site, config)}
        return self.lora.initialise(of_lora, site, config, module)

    def unmergeable(self, site: Site) -> str | None:
        """Refuses the same as LoRA."""
        return self.lora.unmergeable(site)

    @property
    def changes_bias(self) -> bool:
        """Whether B has a bias."""
        return self.lora.changes_bias

    def bias_delta(self, lora_scaling: Any, lora_bias: Any = None) -> Any:
        """Returns s times the bias of B, if it has one."""
        return self.lora.bias_delta(lora_scaling, lora_bias)
