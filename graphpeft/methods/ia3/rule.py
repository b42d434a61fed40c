"""The rules of (IA)³: factors for the features that go into a layer, or that come out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.methods.matrices import matrices_of
from graphpeft.rules.delta_rule import WeightRule
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import InputRule, OperationRule
from graphpeft.sites.site import LeafSite


@dataclass(frozen=True)
class Factors(WeightRule):
    """The factors of one layer.

    Attributes:
        positions: The number of dimensions of a convolution's kernel; 0 for a matrix.
        groups: The number of groups of a convolution's features.
    """

    positions: int = 0
    groups: int = 1

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Convolution, ops.Weight)

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses weights that are neither matrices, stacks of these, nor those of convolutions."""
        if isinstance(site, LeafSite):
            return None
        reason = super().check(site, config)
        if reason is None and site.layout is not ops.Convolution and len(site.shape) not in (2, 3):
            reason = f"its {site.attribute} of shape {tuple(site.shape)} is no matrix, whose features have factors"
        return reason

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws the factors, and sets them to 1 where the config asks for it, as PEFT does."""
        parameters["ia3_l"].normal_()
        if config.init_ia3_weights:
            parameters["ia3_l"].fill_(1)

    def _beside(self, ia3_l: Any) -> Any:
        """Returns factors in a shape that broadcasts over features, which a convolution has in front of positions."""
        return ia3_l[0] if self.positions else ia3_l.flatten()

    def unmergeable(self, site: Any) -> str | None:
        """Refuses calls of layers, as PEFT does: quantised weights can't be scaled in place."""
        return "the factors of a quantised layer aren't merged, as in PEFT" if isinstance(site, LeafSite) else None


@dataclass(frozen=True)
class InputFactors(Factors, InputRule):
    """Factors for what goes into a layer."""

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the factors, (1, in), of each matrix in a stack, or with a 1 for each dimension of a kernel."""
        stack, _, columns = matrices_of(site)
        shape = (1, site.in_features, *(1,) * self.positions) if self.positions else (*stack, 1, columns)
        return {"ia3_l": ParameterSpec(shape, key="ia3_l")}

    def enter(self, x: Any, ia3_l: Any) -> Any:
        """Returns l ⊙ x."""
        return (x * self._beside(ia3_l)).to(x.dtype)

    def delta(self, weight: Any, ia3_l: Any) -> Any:
        """Returns W diag(l) − W; a group's kernels have the factors of its own features."""
        if self.groups == 1:
            return weight * (ia3_l - 1)
        grouped = weight.unflatten(0, (self.groups, -1))
        return (grouped * (ia3_l - 1).unflatten(1, (self.groups, -1)).transpose(0, 1)).flatten(0, 1)


@dataclass(frozen=True)
class OutputFactors(Factors, OperationRule):
    """Factors for what comes out of a layer, with its bias."""

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the factors: (out, 1), of each matrix in a stack; (1, out, 1, …) of a convolution."""
        stack, rows, _ = matrices_of(site)
        shape = (1, site.out_features, *(1,) * self.positions) if self.positions else (*stack, rows, 1)
        return {"ia3_l": ParameterSpec(shape, key="ia3_l")}

    def rewrite(self, y: Any, ia3_l: Any) -> Any:
        """Returns l ⊙ y."""
        return (y * self._beside(ia3_l)).to(y.dtype)

    def delta(self, weight: Any, ia3_l: Any) -> Any:
        """Returns diag(l) W − W."""
        return weight * ((ia3_l.transpose(0, 1) if self.positions else ia3_l) - 1)

    def bias_delta(self, bias: Any, ia3_l: Any) -> Any:
        """Returns l ⊙ b − b."""
        return bias * (ia3_l.flatten() - 1)
