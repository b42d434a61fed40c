"""Adapters in mlx-lm's files, with mlx-lm itself as the oracle: it runs in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from tqdm import tqdm

from graphpeft import LoraConfig, get_peft_model, save_adapter

_PYTHON = Path(__file__).parents[2] / ".venv-stacks" / "bin" / "python"
_IDS = torch.tensor([[3, 7, 11, 2, 9, 23]])
_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]},
    "patterns": {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 1}},
    "rsLoRA": {"use_rslora": True, "target_modules": ["v_proj"]},
    "DoRA": {"r": 2, "use_dora": True, "target_modules": ["q_proj", "o_proj"]},
    "embeddings": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    "heads": {"r": 2, "target_modules": ["lm_head"]},
    "experts": {"r": 4, "target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"]},
}


class Row(NamedTuple):
    """What came of one kind of adapter on one model: the largest difference of a logit, relative to the largest."""

    model: str
    kind: str
    deviation: float


def versions() -> str:
    """Returns the versions of the packages that ran."""
    code = "from importlib.metadata import version as v; print('mlx-lm', v('mlx-lm') + ',', 'mlx', v('mlx'))"
    return subprocess.run([_PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def rows() -> Iterator[Row]:
    """Yields what comes of each kind of adapter on each model."""
    for kind, (name, more) in tqdm(_MODELS.items(), "mlx-lm", unit="model"):
        with tempfile.TemporaryDirectory() as folder:
            expected = _written(Path(folder), kind, name, more)
            script = Path(__file__).with_name("mlx_logits.py")
            adapters = [str(Path(folder, each)) for each in expected]
            subprocess.run([_PYTHON, script, f"{folder}/model", f"{folder}/out.safetensors", *adapters], check=True)
            found = load_file(f"{folder}/out.safetensors")
        for each, logits in expected.items():
            yield Row(kind, each, float((found[each] - logits).abs().max() / logits.abs().max()))


def _written(folder: Path, kind: str, name: str, more: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Writes a model and its adapters, and returns the logits with each."""

    def base() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, name)(transformers.CONFIG_MAPPING[kind](**_SIZES, **more)).eval()

    base().save_pretrained(folder / "model")
    file = folder / "model" / "config.json"  # as mlx-lm reads it
    config = json.loads(file.read_text())
    file.write_text(json.dumps({"rope_theta": config.get("rope_parameters", {}).get("rope_theta", 10000.0), **config}))
    expected: dict[str, torch.Tensor] = {}
    for each, options in KINDS.items():
        if each == "experts" and "num_local_experts" not in more:
            continue
        model = get_peft_model(base(), LoraConfig(**options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
            expected[each] = model(_IDS).logits
        save_adapter(model, folder / each, stack="mlx")
    return expected
