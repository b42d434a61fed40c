"""The models that are measured, and how they get their adapters."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphpeft

LIBRARIES = {"PEFT": peft, "graphpeft": graphpeft}

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = [*ATTENTION, *MLP]


def nest(layers: int, features: int = 64) -> nn.Module:
    """Returns linear modules, named and nested as a Llama's: seven targets in each layer."""

    def block(names: tuple[str, ...]) -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(features, features, bias=False) for name in names})

    layer_list = nn.ModuleList(nn.ModuleDict({"self_attn": block(ATTENTION), "mlp": block(MLP)}) for _ in range(layers))
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": layer_list})})


def llama(hidden: int, layers: int) -> nn.Module:
    """Returns a Llama with random weights and a small vocabulary, frozen and in evaluation mode."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // min(hidden // 4, 64),
        vocab_size=256,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def adapt(
    model: nn.Module, library: str, dropout: float = 0.0, task: str | None = None, targets: list[str] | str = TARGETS
) -> Any:
    """Adapts `model` with LoRA on every linear module of its layers."""
    package: Any = LIBRARIES[library]
    config = package.LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=targets, task_type=task)
    return package.get_peft_model(model, config)


def adapted(base: nn.Module, library: str, dropout: float = 0.0) -> Any:
    """Returns a copy of `base` that shares its weights' memory, with adapters whose B isn't zero.

    Both libraries' adapters get equal values.
    """
    package: Any = LIBRARIES[library]
    model = adapt(copy_sharing_weights(base), library, dropout, "CAUSAL_LM")
    state = package.get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(0)
    values = {key: torch.randn(state[key].shape, generator=generator) * 0.02 for key in sorted(state)}
    package.set_peft_model_state_dict(model, values)
    return model


def copy_sharing_weights(base: nn.Module) -> nn.Module:
    """Returns a copy of `base` with the very same parameters and buffers, so that both read the same memory."""
    tensors = (*base.parameters(), *base.buffers())
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def adapter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the gradients of what is trained, by names that both libraries share."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            # base_model.model.…q_proj.lora_A.default.weight in PEFT, …q_proj.default.lora_A here
            path = name.removeprefix("base_model.model.").split(".")
            gradients[".".join(part for part in path if part not in ("default", "weight"))] = parameter.grad
    return gradients


def assert_close(what: str, value: torch.Tensor, expected: torch.Tensor, noise: float = 0.0) -> None:
    """Raises if two candidates didn't compute the same, so that nothing else is timed by mistake."""
    difference = (value - expected).abs().max().item()
    scale = expected.abs().max().item()
    assert difference <= 1e-4 * scale + noise, f"{what}: largest difference {difference:.2g}, largest value {scale:.2g}"
