"""A plan of equal layers says of each the same as a plan of that layer alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from contracts import CONTRACTS
from contracts.contract import Contract
from oracle import Case
from torch import nn
from torch.nn.utils import parametrizations

from graphpeft import DeltaRule, LoraConfig, ParameterSpec, TargetedConfig, ops
from graphpeft.adapters.plan import make_plan
from graphpeft.peft_errors import PeftError
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.sites.asked_once import Answers
from graphpeft.sites.finder import SiteFinder

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{begins}")
    for begins in ("Setting boft_n_butterfly_factor to 1", "no gradient goes through", "Sparse invariant checks")
]


def planned(build: Callable[[], nn.Module], make: Callable[[], Any]) -> Any:
    """Returns all that a plan says of each site, or why there is none."""
    try:
        plan = make_plan(build(), make(), "default")
    except PeftError as error:
        return str(error)
    return [comparable(adapted) for adapted in plan.sites], plan.report.refused, list(plan.templates)


def comparable(adapted: AdaptedSite) -> AdaptedSite:
    """Returns an adapted site without functions, which are made anew for each call."""
    return adapted._replace(specs={name: spec._replace(form=None) for name, spec in adapted.specs.items()})


def planned_one_by_one(build: Callable[[], nn.Module], make: Callable[[], Any]) -> Any:
    """Returns the same of a plan that finds each site, and asks the method about it, by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteFinder, "_likeness", lambda *_: None)
        patch.setattr(Answers, "of", lambda _, site, kind, question, ask: ask(site))
        return planned(build, make)


@pytest.mark.parametrize(
    ("contract", "case"),
    [
        pytest.param(contract, case, id=f"{contract}-{case}")
        for contract in CONTRACTS
        for case in (*contract.cases, *contract.beyond)
    ],
)
def test_each_method_says_of_layers_together_what_it_says_of_each(contract: Contract, case: Case) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"first": case.build(), "second": case.build(), "third": case.build()})

    def make() -> Any:
        config = contract.our_config(case)
        if isinstance(getattr(config, "target_modules", None), str):
            config.target_modules = rf"(first|second|third)\.({config.target_modules})"
        return config

    assert planned(build, make) == planned_one_by_one(build, make)


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * input)


class ByLayout(nn.Module):
    """Reads its weight as (out, in) or as (in, out), as it lies in memory."""

    def __init__(self, *, is_turned: bool) -> None:
        super().__init__()
        weight = torch.ones(4, 4)
        self.weight = nn.Parameter(weight.T if is_turned else weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight) if self.weight.is_contiguous() else x @ self.weight


class OwnParameter(nn.Parameter):
    pass


def with_forward() -> nn.Module:
    layer: Any = nn.Linear(4, 4)
    layer.forward = lambda x: nn.functional.linear(2 * x, layer.weight, layer.bias)
    return layer


def with_weight_of_its_own_class() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = OwnParameter(layer.weight)
    return layer


def named(layer: nn.Module, **attributes: Any) -> nn.Module:
    vars(layer).update(attributes)
    return layer


UNLIKE: dict[str, Callable[[], nn.Module]] = {
    "another shape": lambda: nn.Linear(4, 5),
    "another dtype": lambda: nn.Linear(4, 4, dtype=torch.bfloat16),
    "no bias": lambda: nn.Linear(4, 4, bias=False),
    "another class": lambda: Doubled(4, 4),
    "another layout in memory": lambda: nn.Sequential(ByLayout(is_turned=False), ByLayout(is_turned=True)),
    "a forward of its own": with_forward,
    "a weight that is computed": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "a parameter of another class": with_weight_of_its_own_class,
    "an attribute that graphs need": lambda: named(nn.Linear(4, 4), graph=1),
}


@pytest.mark.parametrize("unlike", UNLIKE)
def test_a_layer_with_something_of_its_own_has_a_site_of_its_own(unlike: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), UNLIKE[unlike](), nn.Linear(4, 4), UNLIKE[unlike]())

    def make() -> Any:
        return LoraConfig(target_modules=["0", "1", "2", "3", "1.1"])

    assert planned(build, make) == planned_one_by_one(build, make)


@pytest.mark.parametrize(
    "options", [{"groups": 2}, {"padding_mode": "circular", "padding": 1}, {"bias": False}], ids=str
)
def test_convolutions_with_other_options_have_sites_of_their_own(options: Any) -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Conv1d(4, 4, 3, **each) for each in ({}, options, {}, options)))

    def make() -> Any:
        return LoraConfig(r=2, target_modules=["0", "1", "2", "3"])

    assert planned(build, make) == planned_one_by_one(build, make)


READ: dict[str, Callable[[Any], object]] = {
    "owner": lambda site: site.owner,
    "region": lambda site: site.region,
    "name": lambda site: site.name,
    "label": lambda site: site.label,
    "weight": lambda site: site.weight,
    "beside": lambda site: site.beside,
    "bias": lambda site: site.bias,
    "a copy": lambda site: site._replace(groups=1).owner,
    "a tuple": tuple,
    "an item": lambda site: site[3],
    "a slice": lambda site: site[:4],
    "a key": lambda site: {site: "found"}.keys(),
    "a text": repr,
}


@dataclass(frozen=True)
class Reads(DeltaRule):
    adapts = (ops.Linear,)
    what: str

    def parameters(self, site: Any, config: Any) -> Any:
        return {"shift": ParameterSpec((1,), f"shift of {READ[self.what](site) if self.what in READ else self.what}")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: Any) -> None:
        parameters["shift"].zero_()

    def delta(self, weight: Any, shift: Any) -> Any:
        return shift * weight


@dataclass(kw_only=True)
class ReadsConfig(TargetedConfig):
    peft_type = "READS_A_SITE"
    what: str = ""

    def rule_for(self, site: Any, dtype: torch.dtype) -> Reads:
        return Reads(self.what or f"layer {site.name}")


@pytest.mark.parametrize("what", READ)
def test_what_a_rule_reads_of_a_site_is_of_that_site(what: str) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    found = make_plan(model, ReadsConfig(what=what, target_modules=["0", "1", "2"]), "default").sites
    keys = [re.sub("AskedSite", "Site", adapted.specs["shift"].key) for adapted in found]
    assert keys == [f"shift of {READ[what](adapted.site)}" for adapted in found]
    assert len({*keys}) == 3


def test_rules_that_a_config_chooses_by_name_are_asked_each() -> None:
    # the first of a kind is asked alone, and only the second's answers can be others'
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    found = make_plan(model, ReadsConfig(target_modules=["0", "1", "2"]), "default").sites
    assert [adapted.specs["shift"].key for adapted in found] == [f"shift of layer {number}" for number in range(3)]


def test_a_method_that_reads_no_path_is_asked_for_two_sites() -> None:
    asked: list[str] = []

    class Counted(LoraConfig):
        def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
            asked.append(type(site).__name__)
            return super().rule_for(site, dtype)

    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    config = Counted(target_modules=[str(number) for number in range(9)])
    assert len(make_plan(layers, config, "default").sites) == 9
    assert asked == ["Site", "AskedSite"]
