"""HiRA: the change of a weight is the weight itself, elementwise multiplied by a product of low rank.

    ΔW = W₀ ⊙ (B A)        W₀ (out, in) or (out, in, *kernel), without the changes of other adapters; A (r, in, *kernel)

As W₀ has a high rank, so has ΔW. At an embedding, B and A are factors of the table's transpose:

    y' = y + E[i] ⊙ (Aᵀ[i] Bᵀ)

Source: Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", openreview
TwJrTz9cRS; the same numbers as PEFT's ``tuners/hira/layer.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.recorded import recorded
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.rules.delta_rule import DeltaRule
from graphpeft.rules.options import Editable, InputDropout, Size, Turned
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec, RankAxis, unchanged
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.sites import quantisers
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class Hira(DeltaRule):
    """The change of a matrix, of each matrix in a stack, or of a kernel."""

    needs_matrix: ClassVar[bool] = True

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        rank = config.value_at("r", site)
        shape = (site.out_features, site.in_features) if isinstance(site, LeafSite) else site.matrix_shape
        *stack, rows, columns = shape[: len(shape) - len(self.layout.kernel)]
        shapes = (*stack, rank, columns, *self.layout.kernel), (*stack, rows, rank, *(1,) * len(self.layout.kernel))
        names = ("hira_A", "hira_B")
        return {name: _spec(name, shapes[i], len(stack) + i, config) for i, name in enumerate(names)}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A, and sets B to zero; or draws both."""
        A, B = parameters["hira_A"].normal_(), parameters["hira_B"].normal_()
        if not config.init_weights:
            return
        if config.init_weights == "gaussian" and not self.layout.kernel:
            A.normal_(std=1 / config.value_at("r", site))
        else:
            for factor in A.flatten(0, -3) if A.ndim > 2 and not self.layout.kernel else (A,):
                nn.init.kaiming_uniform_(factor, a=5**0.5)
        B.zero_()

    def delta(self, base: Any, hira_A: Any, hira_B: Any) -> Any:
        """Returns W₀ ⊙ (B A)."""
        if not self.layout.kernel:
            return base * (hira_B @ hira_A)
        return base * self.shaped(hira_B.flatten(1) @ hira_A.flatten(1))


@dataclass(frozen=True, kw_only=True)
class HiraTable(Hira):
    """The change of an embedding."""

    adapts: ClassVar[tuple[type, ...]] = (ops.Embedding,)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A, (r, entries), and B, (features, r)."""
        rank, (entries, features) = config.value_at("r", site), site.matrix_shape
        return {
            "hira_A": _spec("hira_embedding_A", (rank, entries), 0, config),
            "hira_B": _spec("hira_embedding_B", (features, rank), 1, config),
        }

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Sets A to zero, and draws B; or draws both."""
        A, B = parameters["hira_A"].normal_(), parameters["hira_B"].normal_()
        if config.init_weights is not False:
            A.zero_()
            B.normal_()

    def rewrite(self, x: Any, y: Any, operation: Any, base: Any, hira_A: Any, hira_B: Any) -> Any:  # type: ignore[override]
        """Returns y + E[i] ⊙ (Aᵀ[i] Bᵀ)."""
        # Aᵀ is no leaf, and only leaves have sparse gradients; PEFT trains the padding's row as any other
        rows = operation.apply(x, hira_A.T, sparse=False, padding_idx=None) @ hira_B.T
        return (y + operation.apply(x, base) * rows).to(y.dtype)

    def delta(self, base: Any, hira_A: Any, hira_B: Any) -> Any:
        """Returns E ⊙ (Aᵀ Bᵀ)."""
        return base * (hira_A.T @ hira_B.T)


@dataclass(frozen=True, kw_only=True)
class HiraLeaf(Hira):
    """The change of a quantised weight, whose numbers are decoded in each call."""

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses weights whose numbers aren't known."""
        return None if site.is_recoded else f"its weight is multiplied, whose numbers aren't known: it is {site.kind}"

    def rewrite(  # type: ignore[override]
        self,
        x: Any,
        y: Any,
        codes: Any,
        hira_A: Any,
        hira_B: Any,
        training: Any,
        state: Any = None,
        dropout: Any = None,
    ) -> Any:
        """Returns y + (W₀ ⊙ (B A)) dropout(x)."""
        h = x.to(hira_A.dtype)
        if dropout is not None:
            h = F.dropout(h, dropout, training)
        return (y + F.linear(h, _numbers(codes, state).to(hira_A.dtype) * (hira_B @ hira_A))).to(y.dtype)


def _spec(key: str, shape: tuple[int, ...], axis: int, config: Any) -> ParameterSpec:
    """Returns the spec of a factor, which files of PEFT have with the rank `r`, whatever `rank_pattern` says."""
    own = (*shape[:axis], config.r, *shape[axis + 1 :])
    form = FileForm(shape, unchanged, functools.partial(_of_rank, axis, shape), (own,)) if own != shape else None
    return ParameterSpec(shape, key, form=form)


def _of_rank(axis: int, shape: tuple[int, ...], factor: Tensor) -> Tensor:
    """Returns a factor with zeros for the ranks that it lacks."""
    if factor.shape[axis] > shape[axis]:
        raise ValueError(
            f"its factors have rank {factor.shape[axis]}, where rank_pattern says {shape[axis]}, which PEFT ignores at "
            "times; remove rank_pattern from its config"
        )
    return RankAxis(axis).resized(factor, shape)


@recorded
def _numbers(codes: Any, state: Any) -> Tensor:
    return quantisers.numbers_of(codes, state)


@register
@dataclass(kw_only=True)
class HiraConfig(TargetedConfig):
    """The options of HiRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
    openreview TwJrTz9cRS.

    Differs from PEFT: convolutions have the padding mode and the groups of their layer; PEFT pads with zeros where the
    adapter is active, and refuses groups.

    Differs from PEFT: `rank_pattern` gives layers other ranks. PEFT ignores it for a model's first adapter, so that it
    can't read files with other ranks; here, its files are read, with zeros for the ranks that they lack.

    Attributes:
        r: The rank of B A.
        hira_dropout: The probability of dropping an element of the change's input, in training.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        init_weights: True: A is drawn, and B is zero. ``"gaussian"``: likewise, with another A of matrices. False: both
            are drawn. At an embedding, A is zero in place of B.
        rank_pattern: Other ranks, by regular expressions for the end of a path; the first that matches counts.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Conv1d(8, 16, 3)), HiraConfig(r=2, target_modules=["0"]))
        >>> model[0].default.hira_A.shape, model[0].default.hira_B.shape
        (torch.Size([2, 8, 3]), torch.Size([16, 2, 1]))
    """

    peft_type: ClassVar[PeftType] = PeftType.HIRA
    prefix: ClassVar[str | None] = "hira_"
    adapts_leaves: ClassVar[bool] = True
    patterns: ClassVar[Mapping[str, str]] = {"r": "rank_pattern"}
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 32
    hira_dropout: InputDropout = 0.0
    fan_in_fan_out: Turned = False
    init_weights: Editable[bool | Literal["gaussian"] | None] = True
    rank_pattern: dict[str, Size] = field(default_factory=dict)

    @property
    def starts_as_identity(self) -> bool:
        """Whether a factor is zero."""
        return bool(self.init_weights)

    def rule_for(self, site: Any, dtype: torch.dtype) -> Hira:
        """Returns the rule for a call, for an embedding, for a weight's kernel, or for a matrix."""
        if isinstance(site, LeafSite):
            return HiraLeaf()
        return HiraTable() if site.layout is ops.Embedding else Hira()
