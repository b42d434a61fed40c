"""The pass that multiplies what several branches read by all of their A's at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import block, body_of, computed, inputs
from torch import Tensor, nn

from graphpeft import LoraConfig, get_peft_model, optimize, trace
from graphpeft.testing.memory import kept_bytes

pytestmark = pytest.mark.quick("passes")

PASS = "grouped_products"


def test_branches_of_one_input_share_a_product():
    model = block("flat", target_modules=["q", "k"])
    assert [line for line in body_of(model) if "linear(" in line] == [
        "linear = torch._C._nn.linear(tanh, q_slot0_lora_a)",
        "linear_1 = torch._C._nn.linear(linear, q_slot0_lora_b)",
        "linear_2 = torch._C._nn.linear(tanh, k_slot0_lora_a)",
        "linear_3 = torch._C._nn.linear(linear_2, k_slot0_lora_b)",
    ]
    report = optimize(model, [PASS])
    assert report.changed == {PASS: ("q", "k")}
    assert [line for line in body_of(model) if "linear(" in line or "products" in line] == [
        "products = products(tanh, tanh, None, q_slot0_lora_a_1, k_slot0_lora_a_1)",
        "getitem = products[0]",
        "linear_1 = torch._C._nn.linear(getitem, q_slot0_lora_b)",
        "getitem_1 = products[1]",
        "linear_3 = torch._C._nn.linear(getitem_1, k_slot0_lora_b)",
    ]


def test_ranks_may_differ():
    plain, grouped = (block("flat", rank_pattern={"k": 3, "v": 5}) for _ in range(2))
    optimize(grouped, [PASS])
    assert torch.allclose(grouped(inputs()), plain(inputs()), rtol=0, atol=1e-6)


def test_branches_of_several_adapters_share_it():
    model = block("flat")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q", "v"]))
    model.set_adapter(["default", "second"])
    optimize(model, [PASS])
    [line] = [line for line in body_of(model) if " = products(" in line]
    assert line.count("_lora_a_") == 5


@pytest.mark.parametrize("names", [["default", "other"], ["other", "default"]], ids=" ".join)
def test_matrices_of_other_dtypes_multiply_what_is_cast_for_them(names):
    def adapted() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(nn.Sequential(nn.Linear(6, 4)).bfloat16(), config)
        model.add_adapter("other", config, autocast_adapter_dtype=False)
        model.set_adapter(names)
        return model

    plain, grouped = adapted(), adapted()
    optimize(grouped, ["recomputed_casts", PASS])
    for model in (plain, grouped):
        model(inputs(torch.bfloat16)).sum().backward()
    assert torch.equal(grouped(inputs(torch.bfloat16)), plain(inputs(torch.bfloat16)))
    for name in ("default.lora_A", "other.lora_A"):
        assert torch.equal(grouped[0].get_parameter(name).grad, plain[0].get_parameter(name).grad)


def test_branches_with_dropout_keep_masks_of_their_own():
    report = optimize(block("flat", lora_dropout=0.1), [PASS])
    assert report.changed == {PASS: ()}
    assert set(report.left[PASS].values()) == {"its dropout has a mask of its own"}


def test_a_branch_alone_is_left():
    assert optimize(block("regions"), [PASS]).left[PASS] == dict.fromkeys("qkvo", "no other branch has the same input")


@pytest.mark.parametrize("write", ["add_", "relu", "module"])
def test_an_input_that_is_written_between_two_branches_is_two(write):
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y = self.a(x)
            if write == "add_":
                x.add_(1)
            elif write == "relu":
                nn.functional.relu(x, inplace=True)
            else:
                self.relu(x)
            return y + self.b(x)

    def adapted() -> Any:
        torch.manual_seed(0)
        return get_peft_model(trace(Writing()), LoraConfig(target_modules=["a", "b"], init_lora_weights=False))

    plain, grouped = adapted(), adapted()
    assert optimize(grouped, [PASS]).changed == {PASS: ()}
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(grouped(x), plain(x))


class Regions(nn.Module):
    """Reads one value outside of a region and inside of it."""

    def __init__(self, region: Any, first_inside: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
        self.region, self.first_inside = region, first_inside

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1
        if not self.first_inside:
            y = self.a(x)
            with self.region():
                return y, self.b(x)
        with self.region():
            y = self.a(x)
        return y, self.b(x)


def in_half() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("region", [in_half, torch.enable_grad])
@pytest.mark.parametrize("first_inside", [False, True])
def test_branches_on_both_sides_of_a_regions_edge_share_nothing(region, first_inside):
    def adapted() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False)
        return get_peft_model(trace(Regions(region, first_inside), (inputs(),)), config)

    plain, grouped = adapted(), adapted()
    assert optimize(grouped, [PASS]).changed == {PASS: ()}
    with torch.no_grad():
        for found, expected in zip(grouped(inputs()), plain(inputs()), strict=True):
            assert torch.equal(found, expected)
            assert found.requires_grad == expected.requires_grad


def test_beside_recomputed_casts_the_stacked_matrices_are_not_kept():
    plain, grouped = block("flat", torch.bfloat16), block("flat", torch.bfloat16)
    optimize(plain, ["recomputed_casts"])
    optimize(grouped, ["recomputed_casts", PASS])
    x = inputs(torch.bfloat16)
    assert kept_bytes(lambda: grouped(x).sum()) == kept_bytes(lambda: plain(x).sum())


def test_frozen_adapters_get_no_gradient():
    plain, grouped = block("flat"), block("flat")
    optimize(grouped, [PASS])
    for model in (plain, grouped):
        model.k.default.lora_A.requires_grad_(False)
    found, expected = computed(grouped, inputs()), computed(plain, inputs())
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], value, rtol=0, atol=1e-6) for name, value in expected.items())
