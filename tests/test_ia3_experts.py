"""(IA)³ on experts' weights: factors for each expert, which PEFT has not, in three models and their implementations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import VOCABULARY
from torch import Tensor, nn

from graphpeft import IA3Config, PeftModel, get_peft_model

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS: dict[str, Any] = {
    "qwen3": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    ),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
each_model = pytest.mark.parametrize("name", MODELS)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def build(name: str, implementation: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_experts_implementation(implementation)
    return model


def config() -> IA3Config:
    return IA3Config(target_modules=["gate_up_proj", "down_proj"], feedforward_modules=["down_proj"])


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits


def with_factors(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


@each_implementation
@each_model
def test_each_expert_has_its_own_factors(name: str, implementation: str, tmp_path: Path) -> None:
    model: Any = get_peft_model(build(name, implementation), config())
    assert torch.equal(logits(model), logits(build(name, implementation)))
    experts = model.model.layers[0].mlp.experts
    turned = name == "gpt-oss"  # which stores (experts, in, out)
    up, down = experts.default.gate_up_proj_ia3_l, experts.default.down_proj_ia3_l
    assert (tuple(up.shape), tuple(down.shape)) == ((4, 48, 1), (4, 1, 24))
    found = logits(with_factors(model))
    by_hand = build(name, implementation)
    with torch.no_grad():
        for weight, factors in (("gate_up_proj", up), ("down_proj", down)):
            parameter = getattr(by_hand.model.layers[0].mlp.experts, weight)
            parameter.mul_(factors.mT if turned else factors)
    torch.testing.assert_close(found, logits(by_hand), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, logits(build(name, implementation)), atol=1e-3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(build(name, implementation), tmp_path)), found)
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), found, atol=1e-5, rtol=1e-4)


@each_implementation
@each_model
def test_all_factors_of_experts_that_are_used_are_trained(name: str, implementation: str) -> None:
    model: Any = with_factors(get_peft_model(build(name, implementation), config())).train()
    logits(model).square().sum().backward()
    experts = model.model.layers[0].mlp.experts
    for factors in (experts.default.gate_up_proj_ia3_l, experts.default.down_proj_ia3_l):
        assert factors.grad.flatten(1).abs().amax(1).count_nonzero() >= 2
