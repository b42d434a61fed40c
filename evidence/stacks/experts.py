"""Models of Transformers with stacks of experts, with adapters of each expert's matrix.

The oracle is Transformers: it loads the base's checkpoint with the changes added to its matrices.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto

from graphpeft import PeftModel, save_adapter

_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_MOST = 20_000_000
"""The greatest number of a model's parameters: a larger one has sizes that aren't among these."""

IDS = torch.tensor([[3, 7, 11, 2, 9, 23]])


class Row(NamedTuple):
    """What came of one model.

    Attributes:
        kind: The model's type.
        matrices: How many matrices of experts its checkpoint has.
        effect: The largest difference of a logit from that of the base, relative to the largest logit.
        deviation: Likewise the difference from that of the loaded checkpoint.
        is_written: Whether the adapter was written again bit for bit.
        note: Why it wasn't tried, or what failed.
        is_tried: Whether there was a model with such matrices.
    """

    kind: str
    matrices: int = 0
    effect: float = 0.0
    deviation: float = 0.0
    is_written: bool = False
    note: str = ""
    is_tried: bool = True


def rows() -> Iterator[Row]:
    """Yields what comes of each type of model whose code has experts."""
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    for kind, name in tqdm(names.items(), "experts", unit="model"):
        cls = getattr(transformers, name if isinstance(name, str) else name[0], None)
        if cls is None or "experts" not in Path(inspect.getfile(cls)).read_text(encoding="utf-8").lower():
            continue
        try:
            model = _made(kind, cls)
        except Exception as error:  # of any model's code
            yield Row(kind, note=_told(error), is_tried=False)
            continue
        if isinstance(model, str):
            yield Row(kind, note=model, is_tried=False)
        elif model is not None:
            try:
                yield _row(kind, cls, model)
            except Exception as error:
                yield Row(kind, note=_told(error))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}"


def _row(kind: str, cls: Any, model: Any) -> Row:
    checkpoint = {name: own.clone() for name, own in revert_weight_conversion(model, model.state_dict()).items()}
    experts = [name for name, own in checkpoint.items() if re.search(r"\.experts\.\d+\.", name) and own.dim() == 2]
    if not experts:
        return Row(kind, note="its checkpoint has stacks, too", is_tried=False)
    with tempfile.TemporaryDirectory() as folder:
        changes = _write(Path(folder, "adapter"), checkpoint, experts)
        changed = {name: (own + changes.get(name, 0)).contiguous() for name, own in checkpoint.items()}
        model.config.save_pretrained(Path(folder, "merged"))
        save_file(changed, Path(folder, "merged", "model.safetensors"), metadata={"format": "pt"})
        expected = _logits(cls.from_pretrained(Path(folder, "merged")).eval())
        before, largest = _logits(model), expected.abs().max()
        adapted = PeftModel.from_pretrained(model, Path(folder, "adapter"))
        effect, deviation = (float((_logits(adapted) - other).abs().max() / largest) for other in (before, expected))
        save_adapter(adapted, Path(folder, "again"), stack="transformers4")
        given, found = (load_file(Path(folder, name, "adapter_model.safetensors")) for name in ("adapter", "again"))
    is_written = found.keys() == given.keys() and all(torch.equal(found[key], given[key]) for key in given)
    return Row(kind, len(experts), effect, deviation, is_written)


def _small(config: Any) -> Any:
    for name, value in _SIZES.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name, value in vars(config).items():
        if name == "mlp_layer_types":
            setattr(config, name, ["sparse"] * 2)
        elif name == "layer_types" and value:
            setattr(config, name, list(value)[:2])
        elif name.endswith("_config") and hasattr(value, "to_dict"):
            _small(value)
    return config


def _made(kind: str, cls: Any) -> Any:
    """Returns a small model that computes, None if it has no stacks of experts, or why there is no small one."""
    with torch.device("meta"):
        sizes = {name: own.shape for name, own in cls(_small(transformers.CONFIG_MAPPING[kind]())).named_parameters()}
    if sum(shape.numel() for shape in sizes.values()) > _MOST:
        return "it has sizes of its own"
    if not any(len(shape) == 3 and "expert" in name for name, shape in sizes.items()):
        return None
    torch.manual_seed(0)
    model = cls(_small(transformers.CONFIG_MAPPING[kind]())).eval()
    with torch.no_grad():
        for name, own in model.named_parameters():
            if "expert" in name or not own.isfinite().all():  # some classes leave experts without first values
                own.copy_(torch.randn(own.shape) * 0.05)
    _logits(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        cls.from_pretrained(folder)  # which the oracle does
    return model


def _logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits.detach()  # with gradients, as in training


def _write(folder: Path, checkpoint: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """Writes LoRA of these matrices, and returns its changes."""
    tensors: dict[str, torch.Tensor] = {}
    changes: dict[str, torch.Tensor] = {}
    for name in names:
        rows_of, columns = checkpoint[name].shape
        A, B = torch.randn(4, columns) * 0.2, torch.randn(rows_of, 4) * 0.2
        path = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        changes[name] = 2 * B @ A
    folder.mkdir()
    # modules beside the experts may have such names, too
    targets = rf".*\.experts\.\d+\.({'|'.join(sorted({name.split('.')[-2] for name in names}))})"
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return changes
