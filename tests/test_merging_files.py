"""Adapters that are merged into a checkpoint's files: the weights of `merge_and_unload`, all else copied, or nothing.

The oracle is the model in memory, which other tests compare with PEFT.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from graphpeft import CheckpointError, LoraConfig, PeftModel, get_peft_model, merge_checkpoint, methods
from graphpeft.files.checkpoint_files import CheckpointFiles

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 30}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
OF_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
TARGETS = ["q_proj", "down_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **options}))


def qwen() -> Any:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **OF_EXPERTS))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)).bfloat16()


def bert() -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=30, **sizes))


CASES: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "LoRA": (llama, "LoraConfig", {"target_modules": TARGETS}),
    "in half precision": (lambda: llama().bfloat16(), "LoraConfig", {"target_modules": TARGETS, "use_dora": True}),
    "first values of the base's": (llama, "LoraConfig", {"target_modules": TARGETS, "init_lora_weights": "pissa"}),
    "biases": (lambda: llama(attention_bias=True), "LoraConfig", {"target_modules": TARGETS, "bias": "all"}),
    "a head": (llama, "LoraConfig", {"target_modules": TARGETS, "modules_to_save": ["lm_head"]}),
    "a head that is tied": (lambda: llama(tie_word_embeddings=True), "LoraConfig", {"modules_to_save": ["lm_head"]}),
    "a table": (llama, "LoraConfig", {"target_modules": ["embed_tokens"]}),
    "rows": (llama, "LoraConfig", {"target_modules": TARGETS, "trainable_token_indices": [3, 7]}),
    "tied, but not there": (lambda: llama(tie_word_embeddings=True), "LoraConfig", {"target_modules": TARGETS}),
    "vectors": (llama, "IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "rotations": (llama, "OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 4, "r": 0}),
    "shared projections": (llama, "VeraConfig", {"r": 2, "target_modules": TARGETS}),
    "experts of entries": (qwen, "LoraConfig", {"target_modules": ["q_proj"], "target_parameters": STACKS}),
    "experts by other names": (mixtral, "LoraConfig", {"target_modules": ["q_proj"], "target_parameters": STACKS}),
    "a classifier": (bert, "LoraConfig", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(case: str, shard_size: str = "4KB") -> Any:
    """Writes a base and an adapter, and returns the class of the base."""
    make, config, options = CASES[case]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained("base", max_shard_size=shard_size)
    adapted = get_peft_model(model.from_pretrained("base", dtype="auto"), getattr(methods, config)(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained("adapter")
    return type(model)


def empty(cls: Any) -> Any:
    with torch.device("meta"):
        return cls._from_config(transformers.AutoConfig.from_pretrained("base"))


def tensors_in(folder: str) -> dict[str, torch.Tensor]:
    return {name: each for file in Path(folder).glob("*.safetensors") for name, each in load_file(file).items()}


@pytest.mark.parametrize("case", [case for case in CASES if case != "a head that is tied"])
def test_merged_files_have_the_weights_of_the_model_merged_in_memory(case: str):
    """Fails if a change is left out or computed of other values, or a conversion isn't turned back."""
    cls = written(case)
    in_memory = PeftModel.from_pretrained(cls.from_pretrained("base", dtype="auto"), "adapter").merge_and_unload()
    in_memory.save_pretrained("expected")
    merge_checkpoint(empty(cls), "base", "adapter", "merged")
    found, expected, before = map(tensors_in, ("merged", "expected", "base"))
    assert len([*Path("merged").glob("*.safetensors")]) > 2
    assert found.keys() == expected.keys() == before.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == before[name].dtype for name in found)
    assert any(not torch.equal(found[name], before[name]) for name in found)


def test_what_the_adapter_does_not_change_is_copied():
    """Fails if the files are written anew from the model, which knows neither these tensors nor these files."""
    cls = written("LoRA", "1GB")
    Path("base/model.safetensors").rename("all.safetensors")
    more = {"mtp.layers.0.weight": torch.arange(6, dtype=torch.int16), "scale": torch.tensor(2.0)}
    save_file({**load_file("all.safetensors"), **more}, "base/model.safetensors", {"format": "pt", "by": "hand"})
    for name in ("tokenizer.json", "1_Pooling/config.json", "pytorch_model.bin", ".gitattributes"):
        Path("base", name).parent.mkdir(exist_ok=True)
        Path("base", name).write_text("{}")
    merge_checkpoint(empty(cls), "base", "adapter", "merged")
    files = {str(file.relative_to("merged")) for file in Path("merged").rglob("*") if file.is_file()}
    assert files == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"),
        str(Path("1_Pooling/config.json")),
    }
    old, new = (Path(folder, "model.safetensors").read_bytes() for folder in ("base", "merged"))
    size = 8 + int.from_bytes(old[:8], "little")
    places = {name: each["data_offsets"] for name, each in json.loads(old[8:size]).items() if name != "__metadata__"}
    assert len(old) == len(new)
    assert old[:size] == new[:size]
    changed = {name for name, (start, end) in places.items() if old[size:][start:end] != new[size:][start:end]}
    assert changed == {name for name in places if any(target in name for target in TARGETS)}


def test_a_model_of_ones_own_is_merged_by_its_own_names():
    """Fails if only models of Transformers have files."""
    base = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    Path("base").mkdir()
    save_file(base.state_dict(), "base/model.safetensors")
    adapted: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    adapted.save_pretrained("adapter")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    assert [file.name for file in merge_checkpoint(model, "base", "adapter", "merged")] == ["model.safetensors"]
    expected, found = adapted.merge_and_unload().state_dict(), tensors_in("merged")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_memory_holds_one_module_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Fails if something keeps weights that were merged, as a transaction does."""
    cls = written("LoRA")
    held, most = [], 0
    read = CheckpointFiles.read

    def watched(files: CheckpointFiles, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(files, name)
        held.append((weakref.ref(tensor), tensor.numel()))
        gc.collect()
        most = max(most, sum(size for alive, size in held if alive() is not None))
        return tensor

    monkeypatch.setattr(CheckpointFiles, "read", watched)
    merge_checkpoint(empty(cls), "base", "adapter", "merged")
    largest = SIZES["hidden_size"] * SIZES["intermediate_size"]
    assert len(held) > 8
    assert most <= 2 * largest  # what is there now, and what is written


@pytest.mark.parametrize("place", ["new", "old"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_merge_that_is_cut_off_leaves_the_folder_as_it_was(place: str, count: int, monkeypatch: pytest.MonkeyPatch):
    """Fails if files are written in place."""
    cls = written("LoRA")
    if place == "old":
        merge_checkpoint(empty(cls), "base", "adapter", "merged")
    before = tensors_in("merged")
    write, writes = CheckpointFiles.write, 0

    def cut_off(files: CheckpointFiles, name: str, tensor: torch.Tensor) -> int:
        nonlocal writes
        writes += 1
        if writes > count:
            raise KeyboardInterrupt
        return write(files, name, tensor + 1)

    monkeypatch.setattr(CheckpointFiles, "write", cut_off)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(empty(cls), "base", "adapter", "merged")
    found = tensors_in("merged")
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in found)
    assert {file.name for file in Path.cwd().iterdir()} == {"base", "adapter", *(["merged"] if before else [])}


def _tied_head() -> Any:
    return empty(written("a head that is tied"))


def _quantised() -> Any:
    model = empty(written("LoRA"))
    model.config.quantization_config = {"quant_method": "fp8"}
    return model


def _of_other_sizes() -> Any:
    written("LoRA")
    with torch.device("meta"):
        return llama(intermediate_size=32)


def _with_values() -> Any:
    return written("LoRA").from_pretrained("base")


def _without_a_file() -> Any:
    model = empty(written("LoRA"))
    Path("base/model-00002-of-00006.safetensors").unlink()
    return model


def _of_integers() -> Any:
    model = empty(written("LoRA", "1GB"))
    tensors = load_file("base/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, "base/model.safetensors")
    return model


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            _tied_head,
            r"no lm_head\.weight, which the adapter changes or reads; load the model, and call merge_and_unload",
        ),
        (_quantised, "is quantised, and its numbers are its quantiser's own"),
        (_of_other_sizes, r"has the shape \(24, 16\) in the checkpoint's files, and \(32, 16\) in the model"),
        (_with_values, "build the model on the meta device"),
        (_without_a_file, "which isn't there; copy the folder anew"),
        (_of_integers, "is of torch.int8 in the checkpoint's files"),
    ],
)
def test_what_the_files_cannot_hold_is_refused(case: Callable[[], Any], reason: str):
    model = case()
    with pytest.raises(CheckpointError, match=reason):
        merge_checkpoint(model, "base", "adapter", "merged")
    assert not Path("merged").exists()


def test_a_checkpoint_is_not_merged_into_itself():
    model = empty(written("LoRA"))
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        merge_checkpoint(model, "base", "adapter", "base")
