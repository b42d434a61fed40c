"""Poly: each task mixes low-rank branches, its skills, and each row of a batch has a task.

    y = W x + b + (x A) B / r          A = Σₖ pₖ Aₖ, B = Σₖ pₖ Bₖ for the task of a row
    pₖ = σ(l[task]ₖ) / Σⱼ σ(l[task]ⱼ)

With `n_splits`, the inputs of A and the outputs of B are in as many parts, each with shares of its own (multi-head
routing). In training, σ(l) is a sample of a relaxed Bernoulli distribution with these logits.

Source: Ponti et al., "Combining Modular Skills in Multitask Learning", arXiv 2202.13914; Caccia et al., "Multi-Head
Adapter Routing for Cross-Task Generalization", arXiv 2211.03831; the same numbers as PEFT's ``tuners/poly/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.changed_products import products_by_row
from graphpeft.graph.recorded import as_node, recorded
from graphpeft.graph.scaled_sum import is_captured
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.rules.options import InitWeights, Size
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.rule import OperationRule
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig
from graphpeft.wording import number_of


@dataclass(frozen=True, kw_only=True)
class Poly(OperationRule):
    """The branch beside a linear operation, or beside the call of a layer.

    Attributes:
        splits: The number of parts of the features.
        casts: Whether the dtype of the parameters may differ from the operation's.
    """

    splits: int
    casts: bool

    call_inputs: ClassVar[tuple[str, ...]] = ("task_ids",)

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses other operations than linear ones, and features that don't go into the parts."""
        if not isinstance(site, LeafSite) and site.op is not ops.Linear:
            return f"Poly is a branch beside a linear operation, and its {site.attribute} has other uses"
        if not isinstance(site, LeafSite) and site.is_layer and site.transposed:
            return "it is a Conv1D, which has rows and positions in one dimension, and Poly has a task for each row"
        for kind, size in (("inputs", site.in_features), ("outputs", site.out_features)):
            if size % self.splits:
                return f"n_splits={self.splits} doesn't divide its {size} {kind}"
        return None

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B of all skills, and the tasks' logits."""
        wide, high, of_skills = site.in_features // self.splits, site.out_features // self.splits, config.n_skills
        return {
            "poly_lora_A": ParameterSpec((self.splits, of_skills, wide, config.r), "poly_lora_A"),
            "poly_lora_B": ParameterSpec((self.splits, of_skills, config.r, high), "poly_lora_B"),
            "poly_logits": ParameterSpec((config.n_tasks, self.splits * of_skills), "poly_router.module_logits"),
        }

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns 1/r."""
        return {"scale": 1 / config.r}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and the logits, and sets B to zero or draws it."""
        _draw(parameters["poly_lora_A"])
        if config.init_weights:
            parameters["poly_lora_B"].zero_()
        else:
            _draw(parameters["poly_lora_B"])
        parameters["poly_logits"].uniform_(-1e-3, 1e-3)

    def rewrite(
        self,
        x: Any,
        y: Any,
        task_ids: Any,
        training: Any,
        poly_lora_A: Any,
        poly_lora_B: Any,
        poly_logits: Any,
        scale: Any,
    ) -> Any:
        """Returns y + (x A) B / r, with the A and the B of each row's task."""
        h = x.to(poly_lora_A.dtype) if self.casts else x
        shares = shares_of(h, poly_logits, task_ids, self.splits, training)
        down = torch.einsum("bqs,qsdr->bqdr", shares, poly_lora_A).flatten(1, 2)
        up = torch.einsum("bqs,qsrd->brqd", shares, poly_lora_B).flatten(2)
        result = as_node(products_by_row, y, h, down, up, scale)
        return result.to(y.dtype) if self.casts else result

    def unmergeable(self, site: Any) -> str:
        """Returns that no weight does what it does."""
        return "Poly mixes its skills by the tasks of each call, so that no one weight does what it does"


def _draw(factors: Tensor) -> None:
    """Draws the factors of all skills and parts as PEFT does, each as its transpose."""
    splits, skills, wide, high = factors.shape
    for skill in range(skills):
        for split in range(splits):
            drawn = nn.init.kaiming_uniform_(torch.empty(high, wide), a=5**0.5)
            factors[split, skill] = drawn.mT


@recorded
def shares_of(h: Tensor, logits: Tensor, task_ids: Tensor, splits: int, training: bool) -> Tensor:
    """Returns the shares of the skills for each row, (rows, splits, skills).

    Args:
        h: The input of the branch, of shape (rows, …).
        logits: The tasks' logits, (tasks, splits · skills).
        task_ids: The task of each row.
        splits: The number of parts of the features.
        training: Whether the shares are drawn.
    """
    if not is_captured():
        _check(h, len(logits), task_ids)
    chosen = logits[task_ids.to(logits.device)].unflatten(-1, (splits, -1))
    weights = _relaxed(chosen) if training else chosen.sigmoid()
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-12)


def _check(h: Tensor, count: int, task_ids: Tensor) -> None:
    if task_ids.shape != h.shape[:1]:
        raise ValueError(
            f"task_ids has the shape {tuple(task_ids.shape)}, and an adapted layer is given "
            f"{number_of(h.shape[0], 'row')}; pass one task for each row of the batch, which must be the "
            "first dimension there"
        )
    unknown = [task for task in task_ids.tolist() if not 0 <= task < count]
    if unknown:
        raise ValueError(f"task_ids has {unknown[0]}, and the adapter's tasks are 0 to {count - 1}, by its n_tasks")


def _relaxed(logits: Tensor) -> Tensor:
    """Returns a sample of a relaxed Bernoulli distribution of temperature 1, as ``torch.distributions`` draws it."""
    limits = torch.finfo(logits.dtype)
    drawn, likely = (
        each.clamp(limits.eps, 1 - limits.eps)
        for each in (torch.rand(logits.shape, dtype=logits.dtype, device=logits.device), logits.sigmoid())
    )
    sample = drawn.log() - (-drawn).log1p() + likely.log() - (-likely).log1p()
    return sample.sigmoid().clamp(limits.tiny, 1 - limits.eps)


@register
@dataclass(kw_only=True)
class PolyConfig(TargetedConfig):
    """The options of Poly beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Each call of the model is given the tasks of its rows, as ``model(x, task_ids=…)``, a tensor of whole numbers; so is
    ``generate``.

    Differs from PEFT: `task_ids` reach the layers of any model, where PEFT has them of its classes for tasks alone; an
    input of any number of dimensions is taken; the first one counts the rows.

    Source: Ponti et al., "Combining Modular Skills in Multitask Learning", arXiv 2202.13914; Caccia et al., "Multi-Head
    Adapter Routing for Cross-Task Generalization", arXiv 2211.03831.

    Attributes:
        r: The rank of a skill's factors.
        init_weights: Whether B is zero at first; if False, it is drawn like A.
        poly_type: ``"poly"``, the only kind that there is.
        n_tasks: The number of tasks.
        n_skills: The number of skills.
        n_splits: The number of parts of the features, with shares of their own.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> config = PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> model(torch.ones(2, 8), task_ids=torch.tensor([0, 2])).shape
        torch.Size([2, 16])
    """

    peft_type: ClassVar[PeftType] = PeftType.POLY
    prefix: ClassVar[str | None] = "poly_"
    lacks: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})
    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 8
    init_weights: InitWeights = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: Size = 1
    n_skills: Size = 4
    n_splits: Size = 1

    def rule_for(self, site: Any, dtype: torch.dtype) -> Poly:
        """Returns the rule of a linear operation, or of a call."""
        return Poly(splits=self.n_splits, casts=isinstance(site, LeafSite) or site.dtype != dtype)
