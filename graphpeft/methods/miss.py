"""MiSS: one small matrix changes each block of a weight's columns.

    ΔW = [Dᵀ Dᵀ … Dᵀ]            D (r, out), cut to W's columns:   y' = y + (x₁ + x₂ + …) D,  xᵢ: the r-blocks of x
    D = [M M … M]                with "mini": M (r, mini_r)
    ΔWᵢⱼ = Wᵢⱼ Dᵢ + Dᵢ            with "bat": Dᵢ (r, r) for each r-block of W's rows

Source: Kang and Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", arXiv
2409.15371; the same numbers as PEFT's ``tuners/miss/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.lycoris import draw
from graphpeft.methods.matrices import matrices_of
from graphpeft.rules.delta_rule import DeltaRule, ProductRule
from graphpeft.rules.options import InputDropout, Size, TrainedBiases
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Factor, Product
from graphpeft.rules.registry import register
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class Miss(ProductRule):
    """One block for all blocks of columns.

    Attributes:
        rows: The number of W's rows.
        columns: The number of its columns.
        is_mini: Whether the block has fewer columns than W has rows, and is repeated.
    """

    rows: int
    columns: int
    is_mini: bool = False

    needs_matrix: ClassVar[bool] = True
    adapts_calls: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses blocks that don't fit."""
        reason = super().check(site, config)
        if reason is not None:
            return reason
        _, rows, columns = matrices_of(site)
        if config.r > columns:
            return f"r={config.r} is more than the {columns} columns of its weight"
        if self.is_mini and rows % config.mini_r:
            return f"mini_r={config.mini_r} doesn't divide the {rows} rows of its weight"
        return None

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns D, or M."""
        stack, rows, _ = matrices_of(site)
        return {"miss_block": ParameterSpec((*stack, config.r, config.mini_r if self.is_mini else rows), "miss_block")}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Sets the block to zero, or draws it."""
        if config.init_weights is False:
            draw(parameters["miss_block"], site)
        else:
            parameters["miss_block"].zero_()

    def fitted(self, x: Any, parameter: Any) -> Any:
        """Returns the input in whole blocks, for which PEFT draws a mask."""
        return in_whole_blocks(x, parameter)

    def product(self, miss_block: Any) -> Product:
        """Returns ΔW as one factor."""
        return Product((_Blocks(miss_block, self.rows, self.columns),))


@dataclass(frozen=True)
class _Blocks(Factor):
    """The same block for all blocks of columns."""

    block: Any
    rows: int
    columns: int

    def applied(self, h: Any) -> Any:
        """Returns (x₁ + x₂ + …) D."""
        return sum_of_blocks(h, self.block) @ repeated(self.block, self.rows)

    def matrix(self) -> Any:
        """Returns [Dᵀ Dᵀ …]."""
        return in_each_block(self.block, self.rows, self.columns)


@recorded
def in_whole_blocks(x: Tensor, block: Tensor) -> Tensor:
    """Returns an input with zeros behind its features, to a multiple of a block's."""
    lacking = -x.shape[-1] % block.shape[-2]
    return F.pad(x, (0, lacking)) if lacking else x


@recorded
def sum_of_blocks(x: Tensor, block: Tensor) -> Tensor:
    """Returns the sum of an input's blocks of features, which are as long as a block's."""
    return x.unflatten(-1, (-1, block.shape[-2])).sum(-2)


@recorded
def repeated(block: Tensor, rows: int) -> Tensor:
    """Returns D, with a column for each row of the weight, as a block beside itself.

    Args:
        block: D, or M; of shape (…, r, columns).
        rows: The number of the weight's rows.
    """
    count = rows // block.shape[-1]
    return block if count == 1 else torch.cat([block] * count, -1)


@recorded
def in_each_block(block: Tensor, rows: int, columns: int) -> Tensor:
    """Returns the change of a weight that has the same block in all blocks of its columns, (…, rows, columns).

    Args:
        block: D or M; of shape (…, r, columns).
        rows: The number of the weight's rows.
        columns: The number of its columns.
    """
    one = repeated(block, rows).mT
    number = -(-columns // one.shape[-1])
    return torch.cat([one] * number, -1)[..., :columns]


@dataclass(frozen=True, kw_only=True)
class MissBat(DeltaRule):
    """A block for each block of rows, which multiplies the weight so far."""

    needs_matrix: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses weights that aren't matrices of whole blocks."""
        reason = super().check(site, config)
        if reason is not None:
            return reason
        _, rows, columns = matrices_of(site)
        if rows % config.r or columns % config.r:
            return f"init_weights='bat' needs blocks of {config.r}×{config.r}, and its weight is {rows}×{columns}"
        if config.miss_dropout and not config.inference_mode:
            return "init_weights='bat' changes the weight, and has no branch for miss_dropout; set it to 0"
        return None

    def dropout_of(self, config: Any) -> float:
        """Returns 0, as nothing is dropped where an adapter with the option is used for inference, in PEFT either."""
        return 0.0

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the blocks."""
        stack, rows, _ = matrices_of(site)
        return {"miss_block": ParameterSpec((*stack, rows // config.r, config.r, config.r), key="miss_block")}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Sets the blocks to zero."""
        parameters["miss_block"].zero_()

    def delta(self, weight: Any, miss_block: Any) -> Any:
        """Returns ΔW."""
        return times_blocks(weight, miss_block)


@recorded
def times_blocks(weight: Tensor, blocks: Tensor) -> Tensor:
    """Returns W D + D for each block of a weight, with the D of its rows.

    Args:
        weight: W, of shape (…, out, in), or (out, in, *kernel).
        blocks: D, of shape (…, out / r, r, r).
    """
    *stack, _, size, _ = blocks.shape
    rows = weight.reshape(*stack, -1, size, math.prod(weight.shape[len(stack) + 1 :]) // size, size)
    # (…, rows of blocks, columns of blocks, r, r)
    made = rows.transpose(-2, -3) @ blocks[..., None, :, :] + blocks[..., None, :, :]
    return made.transpose(-2, -3).reshape(weight.shape)


@register
@dataclass(kw_only=True)
class MissConfig(TargetedConfig):
    """The options of MiSS beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Kang and Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", arXiv
    2409.15371.

    Quantised layers are adapted at their calls, but not with ``"bat"``, which multiplies the weight.

    Differs from PEFT: with ``init_weights="bat"``, `miss_dropout` is refused where the adapter is trained. PEFT takes
    it, and drops nothing.

    Attributes:
        r: The number of columns of a block of the weight.
        miss_dropout: The probability of dropping an element of the branch's input, in training.
        mini_r: The number of columns of the block with ``init_weights="mini"``; it divides the layer's outputs.
        init_weights: The kind of change, and its first values: True for zeros, False for drawn numbers, ``"mini"`` for
            a smaller block of zeros, ``"bat"`` for blocks of zeros that multiply the weight.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"MiSS_only"``, the adapted layers', which may be
            in lower case.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), MissConfig(r=2, target_modules=["0"]))
        >>> model[0].default.miss_block.shape
        torch.Size([2, 16])
    """

    peft_type: ClassVar[PeftType] = PeftType.MISS
    prefix: ClassVar[str | None] = "miss_"
    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 64
    miss_dropout: InputDropout = 0.0
    mini_r: Size = 1
    init_weights: bool | Literal["bat", "mini"] = True
    bias: TrainedBiases[Literal["none", "all", "MiSS_only", "miss_only"]] = "none"

    @property
    def starts_as_identity(self) -> bool:
        """Whether the blocks are zero."""
        return self.init_weights is not False

    def rule_for(self, site: Any, dtype: torch.dtype) -> Miss | MissBat:
        """Returns the rule for the kind of change."""
        if self.init_weights == "bat":
            return MissBat()
        _, rows, columns = matrices_of(site)
        return Miss(rows=rows, columns=columns, is_mini=self.init_weights == "mini")
