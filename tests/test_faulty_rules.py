"""`verify` finds the fault of each rule in `faulty_rules.py` by the law that it breaks, and none in right rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from faulty_rules import FAULTS, Branch, Fault, OutputFactors, Product, Rows, low_rank, scaled_rows
from torch import nn

import graphpeft
from graphpeft.testing import verify

pytestmark = pytest.mark.usefixtures("own_registry")

X = (torch.randn(2, 8, generator=torch.Generator().manual_seed(0)),)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


def verified(name: str, fault: Fault, reference: Callable[..., Any] | None) -> Any:
    config_class = graphpeft.register(fault.config_class(name))
    config = config_class(target_modules=["0", "2"])
    return verify(model(), config, X, reference=reference, progress=False, quiet=True)


@pytest.mark.every
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_by_the_law_that_it_breaks(name: str):
    fault = FAULTS[name]
    found = verified(name, fault, fault.reference)
    assert fault.law in [failure.law[0] for failure in found.failures], found
    assert any(fault.says in failure.why for failure in found.failures if failure.law[0] == fault.law), found


@pytest.mark.parametrize("rule", [Rows, Product, Branch, OutputFactors])
def test_a_rule_without_a_fault_keeps_all_laws_on_all_layers_that_it_takes(rule: type):
    reference = scaled_rows if rule in (Rows, OutputFactors) else low_rank
    found = verified(rule.__name__, Fault("", "", rule), reference)
    assert {verdict.outcome for verdict in found.verdicts} == {"holds"}, found
