"""BOFT: what a layer is given is rotated by a product of sparse rotations, a butterfly, and its outputs are scaled.

    y = s ⊙ W (Rᵀ x) + b        W' = diag(s) W Rᵀ        R = Bₘ … B₂ B₁        Bᵢ = Pᵢ blockdiag(Q₁, …, Qₙ) Pᵢᵀ

Q are rotations made of skew matrices, and Pᵢ permutes the features in groups of 2ⁱ⁻¹ blocks. The features of a
convolution are its input channels at each position of the kernel.

Source: Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv 2311.06243; the same
numbers as PEFT's ``tuners/boft/layer.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.memory_layout import laid_out_as
from graphpeft.methods import rotations
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.matrices import matrices_of
from graphpeft.rules.delta_rule import DeltaRule, WeightRule
from graphpeft.rules.options import Editable, InitWeights, Probability, Size, SizeOrZero, TrainedBiases
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec, unchanged
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.rule import InputRule, OperationRule, Rule
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class Butterfly(WeightRule):
    """The rotation and the scales of one weight.

    Attributes:
        count: The number of blocks of a factor.
        size: The number of features of a block.
        factors: The number of factors of R.
        drops: The share of the blocks of a factor that dropout replaces by the identity, in training.
    """

    count: int
    size: int
    factors: int
    drops: float = 0.0

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Convolution, ops.Weight)
    needs_matrix: ClassVar[bool] = True
    adapts_calls: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses features that don't fall into blocks, and sites where a part of the method has no place."""
        reason = super().check(site, config)
        if reason is not None:
            return reason
        if isinstance(site, LeafSite) and not site.is_recoded:
            return f"its outputs are scaled without its bias, which isn't known: it is {site.kind}"
        if self.drops and site.op is ops.Weight and not config.inference_mode:
            return f"boft_dropout acts at an operation in training, and no one operation uses its {site.attribute}"
        features = matrices_of(site).columns
        if self.count * self.size != features:
            return f"its {features} features don't fall into blocks by boft_block_size or boft_block_num"
        if self.factors > 1 and (self.size % 2 or self.count % 2 ** (self.factors - 1)):
            return (
                f"{self.factors} butterfly factors need blocks of an even size, and a multiple of "
                f"{2 ** (self.factors - 1)} of them; it has {self.count} of {self.size} features. PEFT makes one "
                "factor where its CUDA kernel isn't installed, whatever the config says"
            )
        return None

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns a square matrix for each block of each factor, and the scales."""
        stack, rows, _ = matrices_of(site)
        blocks = (self.count, self.size, self.size)
        of_one, whole = (*stack, 1, *blocks), (*stack, self.factors, *blocks)
        # PEFT without its CUDA kernel makes one factor, whatever the config says
        form = (
            FileForm(whole, unchanged, functools.partial(_filled, self.factors), (of_one,)) if whole != of_one else None
        )
        scales = (1, rows) if self.layout.kernel else (*stack, rows, 1)
        return {"boft_R": ParameterSpec(whole, "boft_R", form=form), "boft_s": ParameterSpec(scales, "boft_s")}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Makes R the identity and all scales 1, or draws both."""
        if config.init_weights:
            parameters["boft_R"].zero_()
            parameters["boft_s"].fill_(1)
        else:
            parameters["boft_R"].normal_(std=0.1)
            parameters["boft_s"].normal_(mean=1, std=0.1)

    def delta(self, weight: Any, boft_R: Any, boft_s: Any) -> Any:
        """Returns diag(s) W Rᵀ − W."""
        return self.changed(weight, boft_R, boft_s, False) - weight

    def changed(self, weight: Any, boft_R: Any, boft_s: Any, training: Any) -> Any:
        """Returns diag(s) W Rᵀ, in PEFT's layout as `weight` is, with dropout in training."""
        matrix = weight.flatten(1) if self.layout.kernel else weight
        made = rotations.butterfly(matrix, boft_R, True, self.drops, training)
        return self.shaped(made * (boft_s.transpose(0, 1) if self.layout.kernel else boft_s))


@dataclass(frozen=True, kw_only=True)
class InputButterfly(Butterfly, InputRule, OperationRule):
    """The rotation of what goes into a linear layer, and the scales of what comes out."""

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    def enter(self, x: Any, boft_R: Any, training: Any) -> Any:
        """Returns Rᵀ x, for rows x R."""
        rotated = rotations.butterfly(x.to(boft_R.dtype), boft_R, False, self.drops, training)
        return laid_out_as(rotated.to(x.dtype), x)

    def rewrite(self, y: Any, boft_s: Any, bias: Any = None) -> Any:
        """Returns s ⊙ (y − b) + b, which is y itself where the scales are 1."""
        scales = boft_s.flatten()
        scaled = y * scales
        return (scaled if bias is None else scaled + bias * (1 - scales)).to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class WeightButterfly(Butterfly, DeltaRule):
    """The rotation and the scales of a weight whose features aren't just those of an operation's input."""

    def rewrite(self, x: Any, y: Any, operation: Any, training: Any, weight: Any, boft_R: Any, boft_s: Any) -> Any:  # type: ignore[override]
        """Returns y + operation(x, diag(s) W Rᵀ − W)."""
        own = self.layout.turned(weight.to(boft_R.dtype))
        change = self.layout.turned(self.changed(own, boft_R, boft_s, training) - own)
        return super().rewrite(x, y, operation, training, change)


def _filled(factors: int, boft_R: Tensor) -> Tensor:
    """Returns the squares of this number of factors, with zeros for those that a file lacks: they are the identity."""
    return F.pad(boft_R, (*(0,) * 6, 0, factors - boft_R.shape[-4]))


@register
@dataclass(kw_only=True)
class BOFTConfig(TargetedConfig):
    """The options of BOFT beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv 2311.06243.

    Differs from PEFT: any number of butterfly factors works on every machine. PEFT makes one factor where its CUDA
    kernel isn't installed; files of such adapters are read, too.

    Differs from PEFT: convolutions have the dilation, groups and padding mode of their layer; PEFT ignores the first
    and the last, and refuses groups. All groups have one rotation.

    Attributes:
        boft_block_size: The number of features of a block, which divides that of the layer; 0 with `boft_block_num`.
        boft_block_num: The number of blocks, likewise; 0 with `boft_block_size`.
        boft_n_butterfly_factor: The number of factors of R. With m of them, groups of 2ᵐ⁻¹ blocks are mixed.
        boft_dropout: The share of the blocks of a factor, chosen at random, that are the identity, in training.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"boft_only"``, the adapted layers'.
        init_weights: Whether the adapter changes nothing at first; if False, rotations and scales are drawn.

    Raises:
        ValueError: For a value that an option can't have, and unless just one of `boft_block_size` and `boft_block_num`
            is 0.

    Examples:
        >>> config = BOFTConfig(boft_n_butterfly_factor=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 8)), config)
        >>> model[0].default.boft_R.shape, model[0].default.boft_s.shape
        (torch.Size([2, 4, 4, 4]), torch.Size([8, 1]))
    """

    peft_type: ClassVar[PeftType] = PeftType.BOFT
    prefix: ClassVar[str | None] = "boft_"
    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    boft_block_size: SizeOrZero = 4
    boft_block_num: SizeOrZero = 0
    boft_n_butterfly_factor: Size = 1
    boft_dropout: Editable[Probability] = 0.0
    fan_in_fan_out: Editable[bool] = False
    bias: TrainedBiases[Literal["none", "all", "boft_only"]] = "none"
    init_weights: InitWeights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ValueError(
                f"boft_block_size={self.boft_block_size}, boft_block_num={self.boft_block_num}: give one of them, and "
                "0 for the other"
            )

    def rule_for(self, site: Any, dtype: torch.dtype) -> Rule:
        """Returns the rule for a linear layer's inputs and outputs, or for a weight."""
        features = matrices_of(site).columns
        options: dict[str, Any] = {
            "count": self.boft_block_num or features // self.boft_block_size,
            "size": self.boft_block_size or features // self.boft_block_num,
            "factors": self.boft_n_butterfly_factor,
            "drops": self.boft_dropout,
        }
        # what an operation adds and the rule can't read would be scaled with the outputs
        if isinstance(site, LeafSite) or (site.op is ops.Linear and not site.both_ways and site.bias_conflict is None):
            return InputButterfly(**options)
        return WeightButterfly(**options)
