"""Small models with an adapter of each kind, whose logits another library must have too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from graphpeft import LoraConfig, get_peft_model

IDS = torch.tensor([[3, 7, 11, 2, 9, 23]])
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]},
    "patterns": {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 1}},
    "rsLoRA": {"use_rslora": True, "target_modules": ["v_proj"]},
    "DoRA": {"r": 2, "use_dora": True, "target_modules": ["q_proj", "o_proj"]},
    "embeddings": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    "heads": {"r": 2, "target_modules": ["lm_head"]},
    "experts": {"r": 4, "target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"]},
}
_SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}
_EXPERTS |= {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
}


class Row(NamedTuple):
    """What came of one kind of adapter on one model.

    Attributes:
        model: The model's type, in Transformers.
        kind: The kind of adapter.
        effect: The largest difference of a logit from the base, relative to the largest.
        deviation: The same between the two libraries; None if the kind is refused.
    """

    model: str
    kind: str
    effect: float
    deviation: float | None


def base(model: str) -> Any:
    """Returns a model of a type, with random weights."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model](**_SIZES, **_EXPERTS.get(model, {}))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def adapted(model: str) -> dict[str, Any]:
    """Returns a model with an adapter of each kind that it has a place for, with random factors."""
    found: dict[str, Any] = {}
    for kind, options in KINDS.items():
        if kind == "experts" and model not in _EXPERTS:
            continue
        found[kind] = get_peft_model(base(model), LoraConfig(**options)).eval()
        with torch.no_grad():
            for parameter in found[kind].parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
    return found


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Returns what a model computes for the tokens."""
    return model(IDS).logits


def compared(model: str, kind: str, expected: Tensor, found: Tensor | None) -> Row:
    """Returns what came of a kind of adapter, with the logits here and there."""
    effect, deviation = (
        None if other is None else float((other - expected).abs().max() / expected.abs().max())
        for other in (logits(base(model)), found)
    )
    assert effect is not None
    return Row(model, kind, effect, deviation)
