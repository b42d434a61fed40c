"""Experts of X-LoRA for the small models of Transformers: LoRA adapters in folders, with values that differ."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from models import GPT2, LLAMA, Example
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from graphpeft import XLoraConfig


class Text(nn.Module):
    """A small model of text that returns its hidden states, and can be pickled then, as Transformers' can't be."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.head = nn.Linear(8, 64)

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False, return_dict: bool = True) -> Any:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        logits = self.head(hidden)
        if not return_dict:
            return (logits,)
        return CausalLMOutput(logits=logits, hidden_states=(hidden,) if output_hidden_states else None)


TEXT = Example("text", Text, lambda generator: {"input_ids": torch.randint(3, 60, (2, 5), generator=generator)}, {})
TARGETS = {
    LLAMA.name: (["q_proj", "v_proj"], ["q_proj", "down_proj"]),
    GPT2.name: (["c_attn"], ["c_attn", "mlp.c_fc"]),
    TEXT.name: (["embed", "layers.0"], ["layers.0", "layers.1"]),
}


def saved(model: nn.Module, folder: str, **options: Any) -> str:
    """Saves a LoRA adapter of PEFT's with random values, and returns its folder."""
    with warnings.catch_warnings():
        # of layers without a bias, and of transposed weights
        warnings.simplefilter("ignore")
        given: dict[str, Any] = {"r": 2} | options
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**given))
        generator = torch.Generator().manual_seed(len(options))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 3
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@functools.cache
def experts(example: Example, dropout: float = 0.0) -> dict[str, str]:
    """Returns two experts of other layers, ranks and scales, by their names."""
    folder = Path(tempfile.mkdtemp())
    options: list[dict[str, Any]] = [{"r": 2, "lora_alpha": 5}, {"r": 3, "use_rslora": True}]
    return {
        str(number): saved(
            example.build(),
            str(folder / str(number)),
            target_modules=targets,
            lora_dropout=dropout,
            **options[number],
        )
        for number, targets in enumerate(TARGETS[example.name])
    }


def config(example: Example, **options: Any) -> XLoraConfig:
    """Returns a config with these experts."""
    given: dict[str, Any] = {"adapters": experts(example)} | options
    return XLoraConfig(**given)
