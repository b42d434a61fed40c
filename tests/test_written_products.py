"""Changes of experts' weights that rules write as products: what multiplies by a stack takes factor by factor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from models import IMPLEMENTATIONS, tiny_experts
from oracle import moved
from torch import Tensor, nn
from torch.fx.proxy import GraphAppendingTracer

import graphpeft
from graphpeft import LoraConfig, get_peft_model
from graphpeft.graph.low_rank_sum import LowRankSum
from graphpeft.graph.written_products import plus_change

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


W, P, Q = (
    torch.randn(shape, generator=torch.Generator().manual_seed(n))
    for n, shape in enumerate(((3, 8, 6), (3, 8, 2), (3, 2, 6)))
)
V = torch.arange(1.0, 7)
SPELLINGS: dict[str, tuple[Callable[..., Any], bool]] = {
    "product": (lambda p, q, v: p @ q, True),
    "scaled": (lambda p, q, v: p @ q * 3, True),
    "scaled from the left": (lambda p, q, v: 0.5 * (p @ q) * 3, True),
    "turned": (lambda p, q, v: (q.mT @ p.mT * 2).mT, True),
    "turned by transpose": (lambda p, q, v: (q.mT @ p.mT).transpose(-1, -2), True),
    "shared factor": (lambda p, q, v: p @ q[0] * 2, True),
    "scaled by columns": (lambda p, q, v: p @ q * v, False),
    "scaled by columns and turned": (lambda p, q, v: (q.mT @ p.mT * v[:, None]).mT, False),
    "turned and then scaled": (lambda p, q, v: (q.mT @ p.mT).mT * v, False),
    "a sum": (lambda p, q, v: p @ q + 1, False),
    "another transpose": (lambda p, q, v: (p @ q).transpose(0, 1).transpose(0, 1), False),
    "full rank": (lambda p, q, v: p @ q @ (q.mT @ q), False),
    "numbers by numbers": (lambda p, q, v: (p @ q) * (p @ q), False),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_sum(spelling: str) -> None:
    function, is_product = SPELLINGS[spelling]

    class Changed(nn.Module):
        def forward(self, w: Tensor, p: Tensor, q: Tensor, v: Tensor) -> Tensor:
            return function(p, q, v)

    graph = fx.Tracer().trace(Changed())
    tracer = GraphAppendingTracer(graph)
    [output] = [node for node in graph.nodes if node.op == "output"]
    weight = next(iter(graph.nodes))
    with graph.inserting_before(output):
        made = plus_change(fx.Proxy(weight, tracer), fx.Proxy(output.args[0], tracer))
    output.args = (made.node,)
    found = fx.GraphModule(nn.Module(), graph)(W, P, Q, V)
    assert (type(found) is LowRankSum) == is_product
    x = torch.ones(3, 2, 8)
    torch.testing.assert_close(x @ found, x @ (W + function(P, Q, V)), atol=1e-4, rtol=1e-4)
