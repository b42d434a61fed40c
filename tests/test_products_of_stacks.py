"""Changes of experts' weights that are products: what multiplies by a stack takes factor by factor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import IMPLEMENTATIONS, tiny_experts
from oracle import moved

import graphpeft
from graphpeft import LoraConfig, get_peft_model
from graphpeft.graph.low_rank_sum import LowRankSum

TARGETS: dict[str, Any] = {"target_modules": ["gate_up_proj", "down_proj"]}
METHODS: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"init_r": 4, "total_step": 9},
    "DeftConfig": {"r": 4},
    "DeloraConfig": {"r": 4},
    "LoraConfig": {"r": 4},
    "PeanutConfig": {"r": 4},
    "PsoftConfig": {"r": 4},
    "TinyLoraConfig": {"r": 4, "u": 5},
    "UniLoraConfig": {"r": 4, "theta_d_length": 64},
    "VBLoRAConfig": {"r": 4, "num_vectors": 9, "vector_length": 8},
    "VeraConfig": {"r": 4},
}
"""The methods whose change of a stack is a product of two smaller factors."""

IDS = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))


def adapted(name: str, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    config = getattr(graphpeft, name)(**TARGETS, **METHODS[name])
    return moved(get_peft_model(tiny_experts(implementation).to(dtype), config))


def train(model: Any) -> None:
    model.train()(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_added_up_and_all_is_the_sum(
    name: str, implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(name, implementation, dtype)
    merged = copy.deepcopy(model).merge_and_unload()(input_ids=IDS).logits
    monkeypatch.setattr(LowRankSum, "total", property(lambda self: pytest.fail("it was added up")))
    sums: list[Any] = []
    monkeypatch.setattr(LowRankSum, "__init__", lambda self, *_: sums.append(tuple(self.shape)))
    found = model(input_ids=IDS).logits
    assert {(16, 64, 32), (16, 32, 32)} <= {*sums}
    precision: dict[str, Any] = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(found, merged, **precision)
    assert not torch.allclose(found, tiny_experts(implementation).to(dtype)(input_ids=IDS).logits, atol=1e-6)
    train(model)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and "experts" in parameter_name:
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_beside_lora_both_are_branches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name, "batched_mm")
    model.add_adapter("second", LoraConfig(r=2, **TARGETS))
    moved(model, 5)
    model.base_model.set_adapter(["default", "second"])
    merged = copy.deepcopy(model).merge_and_unload()(input_ids=IDS).logits
    monkeypatch.setattr(LowRankSum, "total", property(lambda self: pytest.fail("it was added up")))
    torch.testing.assert_close(model(input_ids=IDS).logits, merged, atol=1e-4, rtol=1e-3)
