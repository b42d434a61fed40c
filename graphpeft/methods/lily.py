"""Lily: layers share their factors, and each mixes several of the shared ones by what goes into it.

    y = W x + b + s · Σₑ pₑ Bₑᵀ A x        A (r, in), Bₑ (r, out), R (e, r)
    p = the mean of softmax(R A x) over all tokens of the batch

`stride_A` adjacent layers have one A, and all layers have the same Bₑ, where layers are those of one target and one
shape. Each has a router R of its own.

Source: Zhong et al., "Low-Rank Interconnected Adaptation across Layers", arXiv 2407.09946; the same numbers as PEFT's
``tuners/lily/layer.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.paths import modules_by_path
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import InitWeights, Number, Size
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.rule import OperationRule
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class Lily(OperationRule):
    """The branch beside a linear operation, or beside the call of a layer.

    Attributes:
        experts: The number of Bₑ.
        casts: Whether the dtype of the parameters may differ from the operation's.
    """

    experts: int
    casts: bool

    reads_whole_batch: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses other operations than linear ones."""
        if isinstance(site, LeafSite) or site.op is ops.Linear:
            return None
        return f"Lily mixes its factors by the input of a linear operation, and its {site.attribute} has other uses"

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A, all Bₑ one below the other, and R."""
        of_a, of_b = config.owners_at(site.label)
        return {
            "lily_A": ParameterSpec((config.r, site.in_features), "lily_A.weight", scope=f"A {of_a}"),
            "lily_B": ParameterSpec((self.experts * config.r, site.out_features), "lily_B.weight", scope=f"B {of_b}"),
            "lily_router": ParameterSpec((self.experts, config.r), "lily_router.weight"),
        }

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns s."""
        return {"scaling": config.scaling}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and R, and sets B to zero or draws it; what the layer shares with one before stays as it is."""
        drawn = {name: torch.empty_like(tensor) for name, tensor in parameters.items()}
        # PEFT draws for each layer, also what others replace
        names = [*drawn, "lily_A", "lily_router", *(() if config.init_weights else ("lily_B",))]
        for name in names:
            nn.init.kaiming_uniform_(drawn[name], a=5**0.5)
        if config.init_weights:
            drawn["lily_B"].zero_()
        of_a, of_b = config.owners_at(site.label)
        for name, owner in {"lily_A": of_a, "lily_B": of_b, "lily_router": site.label}.items():
            if owner == site.label:
                parameters[name].copy_(drawn[name])

    def rewrite(self, x: Any, y: Any, lily_A: Any, lily_B: Any, lily_router: Any, scaling: Any) -> Any:
        """Returns y + s · Σₑ pₑ Bₑᵀ A x."""
        h = F.linear(x.to(lily_A.dtype) if self.casts else x, lily_A)
        shares = F.softmax(F.linear(h, lily_router), dim=-1).reshape(-1, self.experts).mean(dim=0)
        mixed = torch.einsum("e,eio->io", shares, lily_B.unflatten(0, (self.experts, -1)))
        change = h @ mixed * scaling
        return y + (change.to(y.dtype) if self.casts else change)

    def unmergeable(self, site: Any) -> str:
        """Returns that no weight does what it does."""
        return "Lily mixes its factors by what goes into a layer, so that no one weight does what it does"


@register
@dataclass(kw_only=True)
class LilyConfig(TargetedConfig):
    """The options of Lily beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Of the entries of `target_modules`, the longest with which a layer's path ends is its target. With a regular
    expression, all layers of one shape share their factors.

    Differs from PEFT: where several entries are the end of a layer's path, PEFT takes any of them, from run to run
    another one.

    Source: Zhong et al., "Low-Rank Interconnected Adaptation across Layers", arXiv 2407.09946.

    Attributes:
        r: The rank of the factors.
        stride_A: How many adjacent layers share an A.
        num_B: The number of Bₑ that all layers share.
        scaling: s.
        init_weights: Whether B is zero at first; if False, it is drawn like A.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> layers = [nn.Linear(8, 8) for _ in range(4)]
        >>> model = get_peft_model(nn.Sequential(*layers), LilyConfig(r=2, stride_A=2, target_modules="[0-3]"))
        >>> model[0].default.lily_A is model[1].default.lily_A, model[0].default.lily_A.shape
        (True, torch.Size([2, 8]))
    """

    peft_type: ClassVar[PeftType] = PeftType.LILY
    prefix: ClassVar[str | None] = "lily_"
    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 32
    stride_A: Size = 1  # noqa: N815
    num_B: Size = 2  # noqa: N815
    scaling: Number = 1.0
    init_weights: InitWeights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._owners: Mapping[str, tuple[str, str]] = {}

    def resolved(self, model: nn.Module) -> PeftConfig:
        """Returns the config with `target_modules` filled in, and in as few entries as PEFT has, which share."""
        config: Any = super().resolved(model)
        named = config.target_modules
        if isinstance(named, set) and len(named) >= _MANY:
            config.target_modules = _ends(named, [path for path in modules_by_path(model) if path])
        return config

    def prepared(self, sites: Sequence[Any]) -> LilyConfig:
        """Returns the config with the layers that own what others share."""
        alike: dict[Any, list[str]] = {}
        for site in sites:
            alike.setdefault((self._target_of(site.name), site.out_features, site.in_features), []).append(site.label)
        config = copy.copy(self)
        config._owners = {
            label: (labels[place - place % self.stride_A], labels[0])
            for labels in alike.values()
            for place, label in enumerate(labels)
        }
        return config

    def owners_at(self, label: str) -> tuple[str, str]:
        """Returns the labels of the sites whose A and whose B a site has.

        Args:
            label: The site's label.
        """
        return self._owners.get(label, (label, label))

    def _target_of(self, name: str) -> str:
        """Returns the entry that a site shares with others."""
        if not isinstance(self.target_modules, set):
            return ""
        return max((entry for entry in self.target_modules if name.endswith(entry)), key=len, default="")

    def rule_for(self, site: Any, dtype: torch.dtype) -> Lily:
        """Returns the rule of a linear operation, or of a call."""
        return Lily(experts=self.num_B, casts=isinstance(site, LeafSite) or site.dtype != dtype)


_MANY = 20
"""From how many entries on PEFT looks for fewer."""


def _ends(named: set[str], paths: Sequence[str]) -> set[str]:
    """Returns the ends of names that tell the named paths from all others, or the names, if these aren't more."""
    as_ends = tuple(f".{entry}" for entry in named)
    others = {end for path in paths if path not in named and not path.endswith(as_ends) for end in _ends_of(path)}
    found: set[str] = set()
    for ends in sorted(_ends_of(entry) for entry in named):
        is_covered = ends[-1].endswith(tuple(f".{end}" for end in found))
        free = [end for end in ends if end not in found and end not in others]
        if free and not is_covered:
            found.add(free[0])
    return found if 0 < len(found) < len(named) else named


def _ends_of(path: str) -> list[str]:
    """Returns the ends of a path at its dots, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]
