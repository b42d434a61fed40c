"""The rules of OFT: a rotation of what a layer is given, or of the rows of an embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.memory_layout import laid_out_as
from graphpeft.methods import rotations
from graphpeft.rules.delta_rule import WeightRule
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import InputRule, OperationRule
from graphpeft.sites.site import LeafSite


@dataclass(frozen=True, kw_only=True)
class Rotation(WeightRule):
    """The rotation at one weight.

    Attributes:
        size: The number of features of a block.
        terms: The number of terms of Neumann's series; None for the exact map.
        eps: How long all blocks together may be, see `projected`; None for any length.
        drops: The share of the blocks that dropout replaces by the identity, in training.
    """

    size: int
    terms: int | None = None
    eps: float | None = None
    drops: float = 0.0

    adapts_calls: ClassVar[bool] = True

    key: ClassVar[str] = "oft_R.weight"

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses sites whose features can't be rotated, and what acts in training where no operation is known."""
        reason = super().check(site, config)
        if reason is None and self.size == 1:
            reason = "its features fall into blocks of one, which can't be rotated; choose another oft_block_size or r"
        for name in ("coft", "module_dropout"):
            if reason is None and getattr(config, name) and site.op is ops.Weight and not config.inference_mode:
                reason = f"{name} acts at an operation in training, and no one operation uses its {site.attribute}"
        return reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the upper triangle of each block's S."""
        count = 1 if config.block_share else rotations.features_of(site) // self.size
        stack = site.matrix_shape[:-2] if rotations.is_weight_as_such(site) else ()
        return {"oft_R": ParameterSpec((*stack, count, self.size * (self.size - 1) // 2), key=self.key)}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Sets S to zero, or draws it."""
        if config.init_weights:
            parameters["oft_R"].zero_()
        else:
            parameters["oft_R"].normal_(std=0.1)

    def _blocks(self, oft_R: Any, training: Any) -> Any:
        return rotations.blocks_of(oft_R, self.size, self.terms, self.eps, self.drops, training)


@dataclass(frozen=True, kw_only=True)
class InputRotation(Rotation, InputRule):
    """The rotation of what goes into a layer.

    Attributes:
        positions: The number of dimensions behind the features: those of a convolution's kernel.
        groups: The number of groups of a convolution's features.
    """

    positions: int = 0
    groups: int = 1

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Convolution, ops.Weight)
    needs_matrix: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses kernels of more than one position, and blocks of features of several groups."""
        reason = super().check(site, config)
        if reason is not None or isinstance(site, LeafSite):
            return reason
        if any(length > 1 for length in site.matrix_shape[2:]) and site.layout is ops.Convolution:
            return (
                f"its kernel is {'×'.join(map(str, site.matrix_shape[2:]))}: positions overlap, so that no rotation of "
                "its input is one of its weight, and PEFT's fresh adapter isn't the identity; kernels of 1 are adapted"
            )
        in_group = rotations.features_of(site) // self.groups
        if in_group % self.size:
            return f"blocks of {self.size} features don't fit into its {self.groups} groups of {in_group}"
        return None

    def enter(self, x: Any, oft_R: Any, training: Any) -> Any:
        """Returns Rᵀ x, for rows x R."""
        blocks = self._blocks(oft_R, training)
        rotated = rotations.in_blocks(x.to(oft_R.dtype), blocks, self.size, self.positions)
        return laid_out_as(rotated.to(x.dtype), x, -1 - self.positions)

    def delta(self, weight: Any, oft_R: Any) -> Any:
        """Returns W Rᵀ − W; a group's kernels have the blocks of its own features."""
        blocks = self._blocks(oft_R, False).mT
        return rotations.weight_in_blocks(weight, blocks, self.size, self.positions, self.groups) - weight


@dataclass(frozen=True, kw_only=True)
class RowRotation(Rotation, OperationRule):
    """The rotation of the rows of an embedding."""

    adapts: ClassVar[tuple[type, ...]] = (ops.Embedding,)
    key: ClassVar[str] = "oft_embedding_R.weight"

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses tables that a layer's operation reads as its weight."""
        if site.op not in (ops.Embedding, ops.Weight):
            return f"it is read as the weight of a {site.op.__name__}, whose outputs aren't its rows"
        return super().check(site, config)

    def rewrite(self, y: Any, oft_R: Any, training: Any) -> Any:
        """Returns y R."""
        return rotations.in_blocks(y.to(oft_R.dtype), self._blocks(oft_R, training), self.size).to(y.dtype)

    def delta(self, weight: Any, oft_R: Any) -> Any:
        """Returns E R − E."""
        return rotations.rows_in_blocks(weight, self._blocks(oft_R, False), self.size) - weight
