"""OFT: what a layer is given is rotated, in blocks of features, so that the angles between its neurons stay.

    y = W (Rᵀ x) + b        W' = W Rᵀ        R = blockdiag(Q₁, …, Qₙ), Q a rotation made of a skew S
    y = E[i] R              E' = E R         at an embedding, whose rows are rotated

Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280; and arXiv
2506.19847 for Neumann's series; the same numbers as PEFT's ``tuners/oft/layer.py``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.memory_layout import laid_out_as
from graphpeft.methods import rotations
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.delta_rule import WeightRule
from graphpeft.rules.options import Editable, InitWeights, NotNegative, Probability, SizeOrZero, TrainedBiases, Within
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.rule import InputRule, OperationRule, Rule
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


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
        positions: The number of dimensions of a convolution's kernel, which stand behind the features.
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


@register
@dataclass(kw_only=True)
class OFTConfig(TargetedConfig):
    """The options of OFT beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280.

    Differs from PEFT: convolutions with kernels over 1 are refused. As positions overlap, a rotation of the input is no
    rotation of the weight: PEFT's fresh adapter changes the outputs, and merges into other ones.

    Differs from PEFT: two active adapters act as they do merged; PEFT rotates the input in the other order.

    Differs from PEFT: `module_dropout` drops blocks in training; PEFT makes the layer for it, and doesn't call it.

    Attributes:
        r: The number of blocks of a layer, or the nearest one that divides its features; 0 with `oft_block_size`.
        oft_block_size: The number of features of a block, or the nearest one that divides them; 0 with `r`.
        module_dropout: The share of the blocks that are the identity, in training.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"oft_only"``, the adapted layers'.
        init_weights: Whether the rotations are the identity at first; if False, they are drawn.
        coft: Whether the rotations stay near the identity: before each use in training, S is shortened to `eps`.
        eps: ε, the length of S over all blocks at the most, for `coft`.
        block_share: Whether all blocks of a layer are the same.
        use_cayley_neumann: Whether rotations are Neumann's series, which is faster than the exact map.
        num_cayley_neumann_terms: The number of terms of the series.

    Raises:
        ValueError: For a value that an option can't have, and unless just one of `r` and `oft_block_size` is 0.

    Examples:
        >>> config = OFTConfig(oft_block_size=4, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> model[0].default.oft_R.shape  # two blocks, each with six elements above the diagonal
        torch.Size([2, 6])
    """

    peft_type: ClassVar[PeftType] = PeftType.OFT
    prefix: ClassVar[str | None] = "oft_"
    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: SizeOrZero = 0
    oft_block_size: SizeOrZero = 32
    module_dropout: Editable[Probability] = 0.0
    fan_in_fan_out: Editable[bool] = False
    bias: TrainedBiases[Literal["none", "all", "oft_only"]] = "none"
    init_weights: InitWeights = True
    coft: bool = False
    eps: NotNegative = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Annotated[int, Within("a whole number from 2 on", 2, 100)] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(f"r={self.r}, oft_block_size={self.oft_block_size}: give one of them, and 0 for the other")

    @classmethod
    def check_file(cls, values: Mapping[str, Any]) -> None:
        """Refuses files of PEFT before 0.14.0, and warns of a series that PEFT has changed since, as PEFT does."""
        if "oft_block_size" not in values:
            raise ValueError("it has no oft_block_size: PEFT before 0.14.0 wrote another method by this name")
        version = re.match(r"(\d+)\.(\d+)", str(values.get("peft_version")))
        if values.get("use_cayley_neumann") and (version is None or tuple(map(int, version.groups())) < (0, 18)):
            warnings.warn(
                "the adapter is of PEFT before 0.18.0, where the series had another last term, so that outputs differ "
                "a little; train it again, or load it there and merge it",
                PeftWarning,
                stacklevel=4,
            )

    def rule_for(self, site: Any, dtype: torch.dtype) -> Rule:
        """Returns the rule for an embedding's rows, or for a layer's inputs."""
        features = rotations.features_of(site)
        nearest = rotations.nearest_divisor(features, self.oft_block_size or self.r)
        options: dict[str, Any] = {
            "size": nearest if self.oft_block_size else features // nearest,
            "terms": self.num_cayley_neumann_terms if self.use_cayley_neumann else None,
            "eps": self.eps if self.coft else None,
            "drops": self.module_dropout,
        }
        if isinstance(site, LeafSite):
            return InputRotation(**options)
        if site.layout is ops.Embedding:
            return RowRotation(**options)
        if site.layout is ops.Convolution:
            return InputRotation(**options, positions=len(site.shape) - 2, groups=site.groups)
        return InputRotation(**options)
