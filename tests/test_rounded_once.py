"""In half precision a merged weight is the sum of the weight and the exact change, rounded once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphpeft import LoraConfig, get_peft_model
from graphpeft.adapters import changes
from graphpeft.graph import ops
from graphpeft.graph.holders import value_at
from graphpeft.graph.overrides import own_parameter
from graphpeft.rules.plain_values import plain
from graphpeft.testing.generated_models import in_dtype
from graphpeft.testing.runs import perturbed
from graphpeft.testing.strategies import METHODS, adaptations

HALVES = (torch.bfloat16, torch.float16)


def merged_and_exact(adapted: Any) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yields the name of each changed weight, its value after merging, and, in double precision, it and its change.

    Left out are weights whose change is itself in half precision, as PEFT's then is: of adapters that hold numbers in
    half precision, and of graphs that add the change to the weight.
    """
    merged = copy.deepcopy(adapted).merge_and_unload()
    exact = dict(copy.deepcopy(adapted).double().named_modules())
    modules = dict(adapted.named_modules())
    for at in changes.changing_sites(modules, adapted._peft_adapters.by_name["default"]):
        own = [value_at(modules[at.site.owner], name) for name in at.names.values()]
        if at.site.op is ops.Weight or any(getattr(value, "dtype", None) in HALVES for value in own):
            continue
        weight = own_parameter(exact[at.site.owner], at.replaced.get(at.site.attribute, at.site.attribute))
        yield at.site.weight, merged.get_parameter(at.site.weight), weight, changes.delta(at, exact)


@torch.no_grad()
def assert_rounded_once(adapted: Any) -> int:
    """Returns how many weights were compared."""
    pairs = list(merged_and_exact(adapted))
    for name, merged, weight, change in pairs:
        exact = weight + change
        # from one number in half precision to the next; the change is computed in single precision, and may cancel
        step = torch.ldexp(torch.full_like(exact, torch.finfo(merged.dtype).eps), torch.frexp(exact).exponent - 1)
        bound = 0.5001 * step + 1e-5 * weight.abs().max()
        assert ((merged.double() - exact).abs() <= bound).all(), name
    return len(pairs)


@pytest.mark.parametrize("method", [method for method in METHODS if METHODS[method].merges], ids=plain)
@given(data=st.data())
@settings(max_examples=settings().max_examples // 4)
def test_each_merged_weight_is_rounded_once(method: str, data: Any):
    drawn, config = data.draw(adaptations(method))
    case = in_dtype(drawn, torch.bfloat16)
    adapted = perturbed(get_peft_model(case.build().eval(), config, example_inputs=case.inputs))
    adapter = adapted._peft_adapters.by_name["default"]
    if adapter.changes_weights and all(at.unmergeable is None for at in adapter.sites):
        assert_rounded_once(adapted)


def adapted_layers(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)).to(dtype)
    return perturbed(get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1"])))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_change_that_is_rounded_before_it_is_added_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    adapted = adapted_layers(dtype)
    assert assert_rounded_once(adapted) == 2
    exactly = changes._delta

    def rounded(adapted: Any, modules: Any, weight: Any, base: Any) -> Tensor:
        change = exactly(adapted, modules, weight, base)
        return change.to(dtype) if own_parameter(modules[adapted.site.owner], "weight").dtype is dtype else change

    monkeypatch.setattr(changes, "_delta", rounded)
    with pytest.raises(AssertionError, match=r"0\.weight"):
        assert_rounded_once(adapted)
