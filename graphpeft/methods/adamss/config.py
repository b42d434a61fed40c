"""AdaMSS: the rows of a weight are in groups, and each group has a change of low rank of its own.

    [ΔW Δb] = P [B₁ A₁; …; Bₙ Aₙ] C        C (r, in + 1): the first right singular vectors of [W b], which are frozen
                                           Aₖ (rank, r), Bₖ (rows of group k, rank); P brings the rows to their places

K-means of the left singular vectors gives the groups, which files don't have: they follow from the base's weight, also
when a file is loaded. Training may choose the most important groups, and leave the others as they are.

Source: "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", openreview 8ZdWmpYxT0; the
same numbers as PEFT's ``tuners/adamss/layer.py``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.methods.adamss import allocation
from graphpeft.methods.adamss.groups import Group, decomposed, groups_of, is_installed
from graphpeft.methods.adamss.rule import Adamss, has_bias
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.factored import sizes_of
from graphpeft.rules.options import Editable, Number, Probability, Seed, Size, Within
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.trained import SiteParameters
from graphpeft.rules.weight_reader import WeightReader
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig

_Step = Annotated[int, Within("a whole number", -(2**31), 2**31 - 1)]


@register
@dataclass(kw_only=True)
class AdamssConfig(TargetedConfig):
    """The options of AdaMSS beside the ones that name targets; the names, defaults and meanings are PEFT's.

    K-means is scikit-learn's, which ``pip install 'graphpeft[clusters]'`` brings.

    With `use_asa`, each step of a training loop ends in ``model.update_and_allocate(step)``, after `backward` and
    before the gradients are set to zero; `update_and_allocate_callback` does that in a ``Trainer``.

    Source: "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", openreview 8ZdWmpYxT0.

    Differs from PEFT: a file is refused on a base whose weights have other right singular vectors than those of the
    base that it was trained on, since their rows may be in other groups; PEFT loads it. Groups that are no longer
    trained stay so when adapters are switched, and in a ``Trainer`` with that callback that resumes. Each adapter's
    schedule counts its own groups, PEFT's those of the first adapter. Steps whose gradients overflow don't count.

    Attributes:
        r: The number of singular vectors, those of the weight at the most.
        num_subspaces: The number of groups of each weight's rows, their number at the most.
        subspace_rank: The rank of each group's change.
        init_weights: ``"orthogonal"``: B is zero at first. None: it is drawn; as is False, for files of older versions.
        use_asa: Whether fewer and fewer groups are trained.
        asa_target_subspaces: The number of groups of all weights together in the end; or one fewer, as in PEFT.
        init_warmup: The step at which importance is measured first.
        final_warmup: The step at which the last groups are left.
        mask_interval: How many steps lie between two allocations.
        asa_importance_beta: How much an average of the importance keeps in a step.
        asa_uncertainty_beta: The same for the average of its deviation.
        asa_schedule_exponent: The power of the remaining share of steps by which groups remain.
        use_dynamic_rank: Whether a group's rank is the number of its large singular values, up to `subspace_rank`.
        svd_threshold: Such a value is above this share of the largest one.
        random_seed: The seed of the decomposition.

    Raises:
        ValueError: For a value that an option can't have, and for a schedule without steps.

    Examples:
        >>> config = AdamssConfig(r=4, num_subspaces=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> [name for name, tensor in model[0].default.named_parameters() if tensor.requires_grad]
        ['adamss_A_0', 'adamss_B_0', 'adamss_A_1', 'adamss_B_1']
    """

    peft_type: ClassVar[PeftType] = PeftType.ADAMSS
    prefix: ClassVar[str | None] = "adamss_"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    parameters_changed_by_steps: ClassVar[frozenset[str] | None] = frozenset()
    default_targets: ClassVar[targets.Defaults] = {**DEFAULT_TARGET_MODULES, "vit": ("query", "value")}

    r: Size = 100
    num_subspaces: Size = 5
    subspace_rank: Size = 1
    init_weights: Editable[bool | Literal["orthogonal"] | None] = "orthogonal"
    use_asa: Editable[bool] = False
    asa_target_subspaces: Editable[_Step] = 50
    init_warmup: Editable[_Step] = 50
    final_warmup: Editable[_Step] = 1000
    mask_interval: Editable[_Step] = 100
    asa_importance_beta: Editable[Probability] = 0.85
    asa_uncertainty_beta: Editable[Probability] = 0.85
    asa_schedule_exponent: Editable[Number] = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: Number = 0.1
    random_seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights is False:
            self.init_weights = None
        if self.init_weights is True:
            raise ValueError("init_weights is True; choose 'orthogonal' or None")
        if self.use_asa:
            self._check_schedule()
        self._groups: Mapping[str, tuple[Group, ...] | str] = {}
        self._directions: dict[str, tuple[Tensor, Tensor]] = {}
        self._averages: allocation.Averages = {}
        self._resting: set[allocation.Place] = set()

    def _check_schedule(self) -> None:
        for name in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; with use_asa, it must be positive")
        if self.init_warmup >= self.final_warmup:
            raise ValueError(
                f"init_warmup={self.init_warmup} and final_warmup={self.final_warmup} leave no steps in which groups "
                "are left; decrease the one, or increase the other"
            )

    @property
    def starts_as_identity(self) -> bool:
        """Whether B is zero."""
        return self.init_weights is not None

    def measured(self, sites: Sequence[Any], weights: WeightReader) -> AdamssConfig:
        """Returns the config with the groups of each weight's rows.

        Raises:
            ValueError: Without scikit-learn.
        """
        if not is_installed():
            raise ValueError(
                "AdaMSS groups rows by the k-means of scikit-learn, which isn't installed; "
                "pip install 'graphpeft[clusters]'"
            )
        config = copy.copy(self)
        fit = [site for site in sites if not isinstance(site, LeafSite) and len(site.shape) > 1]
        found = {
            site.label: weights.read(site, functools.partial(groups_of, site, self))
            for site in fit
            if not sizes_of(site).stack
        }
        config._groups = {label: groups for label, (groups, _) in found.items()}
        config._directions = {label: directions for label, (_, directions) in found.items() if directions is not None}
        return config

    def groups_at(self, site: Any) -> tuple[Group, ...] | str:
        """Returns the groups of a weight's rows, or why it has none.

        Args:
            site: The site.
        """
        return self._groups[site.label]

    def directions_of(self, site: Any, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Returns what `decomposed` gives; a decomposition for the groups is handed out once, and not kept.

        Args:
            site: The site.
            module: The module that owns the weight.
        """
        found = self._directions.pop(site.label, None)
        return decomposed(site, self, module) if found is None else found

    def rule_for(self, site: Any, dtype: torch.dtype) -> Adamss:
        """Returns the rule for a number of groups."""
        groups = self._groups.get(site.label, ())
        return Adamss(sizes=sizes_of(site), count=len(groups), has_bias=has_bias(site))

    # training

    def after_step(self, step: int, sites: Sequence[SiteParameters]) -> None:
        """Updates the importance of groups, and leaves those as they are that matter least; nothing without `use_asa`.

        Raises:
            ValueError: If there are no gradients, or no group would go on.
        """
        if not self.use_asa or not self.init_warmup <= step <= self.final_warmup:
            return
        self._averages = allocation.averaged(sites, self._averages, self.asa_importance_beta, self.asa_uncertainty_beta)
        if step % self.mask_interval:
            return
        resting = self._resting | allocation.unimportant(self._averages, self._target(step, sites))
        for site, parameters in sites:
            for name, parameter in parameters.items():
                if (site.label, name.rpartition("_")[2]) in resting:
                    parameter.grad = None
        self._averages, self._resting = {}, resting

    def _target(self, step: int, sites: Sequence[SiteParameters]) -> int:
        first = sum(len(self.groups_at(site)) for site, _ in sites)
        left = 1 - (step - self.init_warmup) / (self.final_warmup - self.init_warmup)
        last = self.asa_target_subspaces
        return int(last + (first - last) * left**self.asa_schedule_exponent)

    def rests(self, site: Any, name: str) -> bool:
        """Returns whether a group's factors are no longer trained."""
        return (site.label, name.rpartition("_")[2]) in self._resting

    def training_state(self) -> dict[str, Tensor]:
        """Returns the averages, and the groups that are no longer trained."""
        return allocation.as_tensors(self._resting, self._averages)

    def resumed(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns these as attributes."""
        resting, averages = allocation.from_tensors(state)
        return {"_resting": resting, "_averages": averages}
