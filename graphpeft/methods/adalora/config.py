"""AdaLoRA: a product whose ranks go to the weights where they matter most.

    ΔW = s · B (E ⊙ A)        A of shape (r, in), E (r, 1), B (out, r);  s = α / r for the rank r at first

Each rank of each weight is a triplet: a row of A, an element of E and a column of B. Training sets more and more
elements of E to zero: those of the least important triplets of the whole model. A file has the remaining triplets.

Source: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512; the same
numbers as PEFT's ``tuners/adalora/layer.py`` and ``model.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from graphpeft.methods.adalora import allocation, option_checks, ranks_left
from graphpeft.methods.adalora.rule import AdaLora, form_of
from graphpeft.methods.default_targets import ADALORA_TARGETS
from graphpeft.methods.lora.config import LoraConfig
from graphpeft.methods.lora.nested import drop_unused
from graphpeft.rules.combination import Combination
from graphpeft.rules.options import Editable, Index, NotNegative, Size, Within
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.trained import SiteParameters
from graphpeft.targeting import targets

Share = Annotated[float, Within("a number between 0 and 1", math.nextafter(0, 1), math.nextafter(1, 0))]


@register
@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """The options of AdaLoRA beside LoRA's; the names, defaults and meanings are PEFT's.

    Of a loop that trains such an adapter, each step ends in ``model.update_and_allocate(step)``, after `backward` and
    before the gradients are set to zero; `update_and_allocate_callback` does that in a ``Trainer``. The penalty is part
    of the `loss` in what the model returns; `penalty_of` gives it to losses of other kinds.

    Differs from PEFT: several adapters of a model can be trained, each with a budget of its own, where PEFT refuses a
    second one. The penalty is added whatever the `task_type` is; PEFT leaves it out without one. Steps whose gradients
    overflow don't count; in PEFT, they spoil all averages. Beside a base in half precision, PEFT trains the number by
    which a change is divided, too, and saves it nowhere; here it is a constant. A ``Trainer`` resumes from its
    checkpoints, and training goes on from a file: the ranks that the file lacks stay dropped, and averages begin anew.
    With ``lora_alpha=0``, a loaded adapter has the scale of training; PEFT takes the number of remaining ranks for α.

    Source: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.

    Attributes:
        init_r: The rank of each weight at first.
        target_r: The rank that weights have in the end, on average.
        tinit: The number of steps before any rank is dropped.
        tfinal: The number of steps after the last rank was dropped.
        deltaT: How many steps lie between two allocations.
        beta1: How much an average of the importance keeps in a step.
        beta2: The same for the average of its deviation.
        orth_reg_weight: The factor of the penalty.
        total_step: The number of steps altogether.
        rank_pattern: Which ranks of each weight are left, by ``<path>.lora_E``; training fills it in.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"adalora_only"`` or ``"lora_only"``, the adapted
            layers'.
        r: LoRA's, which has no effect, as in PEFT.
        use_rslora: The same.
        alpha_pattern: The same.
        lora_bias: The same.
        init_lora_weights: LoRA's; other values than True and False have no effect.
        use_dora: LoRA's, which is refused.
        loftq_config: The same.

    Raises:
        ValueError: For a value that an option can't have, and for a schedule without a step that drops ranks.

    Examples:
        >>> config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> for step in range(10):
        ...     (model(torch.ones(2, 8)).square().mean() + penalty_of(model)).backward()
        ...     optimizer.step()
        ...     model.update_and_allocate(step)
        ...     optimizer.zero_grad()
        >>> sum(model.peft_config["default"].rank_pattern["0.lora_E"])
        2
    """

    peft_type: ClassVar[PeftType] = PeftType.ADALORA
    lacks: ClassVar[frozenset[str]] = frozenset({"target_parts", "merged_quantiser"})
    changed_by_training: ClassVar[frozenset[str]] = frozenset({"rank_pattern"})
    parameters_changed_by_steps: ClassVar[frozenset[str] | None] = frozenset({"lora_E"})
    patterns: ClassVar[Mapping[str, str]] = {}
    default_targets: ClassVar[targets.Defaults] = ADALORA_TARGETS

    # a wider type than LoRA's, since PEFT takes its own name of the option here, too
    bias: Literal["none", "all", "lora_only", "adalora_only"] = "none"  # type: ignore[assignment]
    r: Editable[Index] = 8  # no size, since it has no effect
    target_r: Editable[Size] = 8
    init_r: Size = 12
    tinit: Editable[Index] = 0
    tfinal: Editable[Index] = 0
    # PEFT's name
    deltaT: Editable[Annotated[int, Within("a positive integer", 1, 2**31 - 1)]] = 1  # noqa: N815
    beta1: Editable[Share] = 0.85
    beta2: Editable[Share] = 0.85
    orth_reg_weight: Editable[NotNegative] = 0.5
    total_step: Editable[Index | None] = None
    # PEFT gives LoRA's option another meaning here: the ranks that remain
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or None
        self._places: Mapping[str, tuple[int, ...]] = {}
        self._averages: allocation.Averages = {}

    def check(self) -> None:
        """Raises ValueError for options that can't be, and warns of those that have no effect."""
        super().check()
        option_checks.warn_of_unused(self)

    def _check_values(self) -> None:
        super()._check_values()
        option_checks.check_values(self)

    @property
    def starts_as_identity(self) -> bool:
        """Whether E starts at zero."""
        return bool(self.init_lora_weights)

    @property
    def takes_product(self) -> bool:
        """False, whatever `init_lora_weights` is."""
        return False

    def places_at(self, label: str) -> tuple[int, ...]:
        """Returns the places of a site's ranks among those with which training began.

        Args:
            label: The site's label.
        """
        return self._places.get(label, tuple(range(self.init_r)))

    def prepared(self, sites: Sequence[Any]) -> AdaLoraConfig:
        """Returns the config with the places of the ranks that `rank_pattern` leaves."""
        config = copy.copy(self)
        config._places = {site.label: ranks_left.places(self, site.label) for site in sites}
        return config

    def rule_for(self, site: Any, dtype: torch.dtype) -> AdaLora:
        """Returns the rule for a weight, or for a call."""
        return AdaLora()

    # training

    def penalty(self, sites: Sequence[SiteParameters]) -> Tensor | None:
        """Returns how far A and B are from orthogonal ones, with its factor."""
        return self.orth_reg_weight * allocation.orthogonality(sites) if self.orth_reg_weight else None

    def after_step(self, step: int, sites: Sequence[SiteParameters]) -> None:
        """Updates the importance of triplets, and sets E of those that are dropped to zero.

        Raises:
            ValueError: If there are no gradients, or no earlier step.
        """
        assert self.total_step is not None
        end = self.total_step - self.tfinal
        if step < end:
            self._averages = allocation.averaged(sites, self._averages, self.beta1, self.beta2)
        if step == end or (self.tinit < step < end and step % self.deltaT == 0):
            self.rank_pattern = ranks_left.after_step(self, self._averages, step, end, sites)  # pyright: ignore[reportIncompatibleVariableOverride]
        elif step < end:
            return
        if self.rank_pattern is None:
            raise ValueError(f"no ranks were dropped until step {end}; call update_and_allocate after each step")
        if step >= end:
            self._averages = {}
        for site, parameters in sites:
            is_left = ranks_left.mask(self, site.label)
            if not bool(is_left.all()):
                parameters["lora_E"][..., ~is_left, :] = 0

    def training_state(self) -> dict[str, Tensor]:
        """Returns the averages, and which ranks are left."""
        return allocation.as_tensors(self.rank_pattern or {}, self._averages)

    def resumed(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns these as attributes."""
        pattern, averages = allocation.from_tensors(state)
        return {"rank_pattern": pattern or None, "_averages": averages}

    # files

    def file_form(self, site: Any, name: str, spec: ParameterSpec) -> FileForm | None:
        """Returns the form with the ranks alone that are left."""
        mask = ranks_left.mask(self, site.label)
        if bool(mask.all()):
            return None
        return form_of(spec.shape, len(spec.shape) - (1 if name == "lora_B" else 2), mask.nonzero().flatten())

    def for_file(self, sites: Sequence[Any]) -> AdaLoraConfig:
        """Returns the config as PEFT reads it."""
        config = copy.deepcopy(self)
        drop_unused(config)
        layers = [site for site in sites if site.is_layer]
        config.fan_in_fan_out = bool(layers) and all(getattr(site, "transposed", False) for site in sites)
        return config

    def fitted_to(self, keys: Collection[str]) -> AdaLoraConfig:
        """Returns the config itself."""
        return self

    def combined(self, configs: Sequence[Any], sites: Sequence[Any], how: Combination) -> AdaLoraConfig:
        """Refuses to combine adapters, as PEFT does.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "adapters of AdaLoRA aren't combined, as in PEFT; convert_to_lora makes LoRA of each, which are"
        )
