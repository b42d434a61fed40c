"""LoRA by the names of another checkpoint of a Transformers model: an entry for each expert's matrix, other paths.

The oracle is Transformers: the base's checkpoint, with the changes added to its matrices, loaded by `from_pretrained`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from graphpeft import AdaptError, CheckpointError, LoraConfig, PeftModel, get_peft_model, save_adapter

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "phimoe": ("PhimoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "minimax": ("MiniMaxForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
        | {
            "kv_lora_rank": 8,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
}
IDS = torch.tensor([[3, 7, 11, 2, 9, 23]])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def base(kind: str) -> Any:
    """Returns a small model, the same in each call."""
    name, more = MODELS[kind]
    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.CONFIG_MAPPING[kind](**{**SIZES, **more})).eval()


def checkpoint_of(model: Any) -> dict[str, torch.Tensor]:
    """Returns a model's tensors by the names of its checkpoint."""
    return {name: tensor.clone() for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}


def is_of_expert(name: str) -> bool:
    """Returns whether a tensor of a checkpoint is an expert's matrix."""
    return ".experts." in name and name.endswith(".weight")


def write(
    folder: str,
    checkpoint: Mapping[str, torch.Tensor],
    names: Iterable[str],
    *,
    rank: Callable[[str], int],
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Writes LoRA with random factors of these tensors of a checkpoint, and returns its changes by their names."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    changes: dict[str, torch.Tensor] = {}
    for name in names:
        path, own, (rows, columns) = name.removesuffix(".weight"), rank(name), checkpoint[name].shape
        A, B = (torch.randn(shape, generator=generator) * 0.2 for shape in ((own, columns), (rows, own)))
        tensors |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
        ranks[path.replace(".", r"\.")] = own
        changes[name] = options.get("lora_alpha", 8) / (own**0.5 if options.get("use_rslora") else own) * B @ A
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "inference_mode": True}
    ends = sorted({name.split(".")[-2] for name in changes})
    if any(name.split(".")[-2] in ends and name not in changes for name in checkpoint):
        ends = sorted(name.removesuffix(".weight") for name in changes)
    patterns = {"rank_pattern": ranks} if set(ranks.values()) != {4} else {}
    Path(folder).mkdir()
    Path(folder, "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ends, **patterns, **options})
    )
    save_file(tensors, Path(folder, "adapter_model.safetensors"))
    return changes


def merged(model: Any, checkpoint: Mapping[str, torch.Tensor], changes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the outputs of a model that Transformers loads from a checkpoint with changes in its matrices."""
    changed = {name: (own + changes.get(name, 0)).contiguous() for name, own in checkpoint.items()}
    Path("merged").mkdir()
    save_file(changed, "merged/model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained("merged")
    return type(model).from_pretrained("merged").eval()(IDS).logits


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_of_each_expert_computes_as_the_checkpoint_with_its_changes(kind: str) -> None:
    model = base(kind)
    checkpoint = checkpoint_of(model)
    names = [name for name in checkpoint if is_of_expert(name) or ".self_attn.o_proj." in name]
    changes = write("adapter", checkpoint, names, rank=lambda _: 4)
    expected = merged(model, checkpoint, changes)
    before = model(IDS).logits
    adapted = PeftModel.from_pretrained(model, "adapter")
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(adapted(IDS).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # PEFT's, of patterns that it has made itself
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_it_computes_as_in_peft(kind: str) -> None:
    checkpoint = checkpoint_of(base(kind))
    write("adapter", checkpoint, filter(is_of_expert, checkpoint), rank=lambda _: 4)
    own, other = PeftModel.from_pretrained(base(kind), "adapter"), peft.PeftModel.from_pretrained(base(kind), "adapter")
    torch.testing.assert_close(own(IDS).logits, other(IDS).logits, atol=1e-6, rtol=1e-5)
    own.save_pretrained("own")
    again = peft.PeftModel.from_pretrained(base(kind), "own")
    torch.testing.assert_close(again(IDS).logits, other(IDS).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_alpha": 3}])
def test_ranks_scales_and_experts_may_differ(options: dict[str, Any]) -> None:
    model = base("qwen3_moe")
    checkpoint = checkpoint_of(model)
    names = [name for name in checkpoint if is_of_expert(name) and ".experts.2." not in name]
    names = [name for name in names if not (".layers.1." in name and "up_proj" in name)]
    changes = write("adapter", checkpoint, names, rank=lambda name: 2 + len(name) % 3, **options)
    expected = merged(model, checkpoint, changes)
    torch.testing.assert_close(PeftModel.from_pretrained(model, "adapter")(IDS).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_written_with_an_entry_for_each_expert_bit_for_bit(kind: str) -> None:
    checkpoint = checkpoint_of(base(kind))
    write("adapter", checkpoint, filter(is_of_expert, checkpoint), rank=lambda _: 4)
    save_adapter(PeftModel.from_pretrained(base(kind), "adapter"), "again", stack="transformers4")
    given, found = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("adapter", "again"))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)
    configs = (json.loads(Path(folder, "adapter_config.json").read_text()) for folder in ("adapter", "again"))
    of_given, of_found = configs
    ends = [{name.rpartition(".")[2] for name in each["target_modules"]} for each in (of_given, of_found)]
    assert ends[0] == ends[1]
    assert (of_found["r"], of_found["lora_alpha"], of_found["rank_pattern"]) == (4, 8, {})


def test_an_expert_without_tokens_has_the_rank_of_the_others() -> None:
    """Fails if ranks are told expert by expert: an untrained one has zeros in all of its ranks."""
    checkpoint = checkpoint_of(base("qwen3_moe"))
    write("adapter", checkpoint, filter(is_of_expert, checkpoint), rank=lambda _: 4)
    tensors = load_file("adapter/adapter_model.safetensors")
    idle = {key: torch.zeros_like(tensor) for key, tensor in tensors.items() if ".experts.1." in key and "_B" in key}
    save_file(tensors | idle, "adapter/adapter_model.safetensors")
    save_adapter(PeftModel.from_pretrained(base("qwen3_moe"), "adapter"), "again", stack="transformers4")
    given, found = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("adapter", "again"))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)


def test_what_is_trained_on_the_joined_weights_is_written_so_too() -> None:
    config = LoraConfig(r=2, target_parameters=["gate_up_proj", "down_proj"], target_modules=["q_proj"])
    adapted = get_peft_model(base("qwen3_moe"), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    save_adapter(adapted, "adapter", stack="transformers4")
    again = PeftModel.from_pretrained(base("qwen3_moe"), "adapter")
    torch.testing.assert_close(again(IDS).logits, adapted(IDS).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_mlx_has_stacks_of_experts_with_zeros_where_none_is_adapted(kind: str) -> None:
    checkpoint = checkpoint_of(base(kind))
    names = [name for name in checkpoint if is_of_expert(name) and ".experts.1." not in name]
    write("adapter", checkpoint, names, rank=lambda _: 4)
    adapted = PeftModel.from_pretrained(base(kind), "adapter")
    save_adapter(adapted, "mlx", stack="mlx")
    stacks = load_file("mlx/adapters.safetensors")
    assert {key.split(".")[-2] for key in stacks} == {"gate_proj", "up_proj", "down_proj"}
    assert all(tensor.shape[0] == 4 and not tensor[1].any() for tensor in stacks.values())
    again = PeftModel.from_pretrained(base(kind), "mlx")
    torch.testing.assert_close(again(IDS).logits, adapted(IDS).logits, atol=1e-6, rtol=1e-5)


def of_llava() -> Any:
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**{key: value for key, value in SIZES.items() if "moe" not in key})
    sizes: dict[str, Any] = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    seen = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=seen, text_config=text, tie_word_embeddings=False)
    ).eval()


def test_paths_of_another_version_are_found() -> None:
    model = of_llava()
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    own = "model.language_model.layers.1.self_attn.q_proj"
    weight = {name: model.get_parameter(f"{own}.weight")}
    changes = write("adapter", weight, [name], rank=lambda _: 4, target_modules=[name.removesuffix(".weight")])
    adapted = PeftModel.from_pretrained(of_llava(), "adapter")
    assert adapted.targeted_module_names == [own]
    merged_weight = adapted.merge_and_unload().get_parameter(f"{own}.weight")
    torch.testing.assert_close(merged_weight, model.get_parameter(f"{own}.weight") + changes[name])


@pytest.mark.parametrize(
    ("stack", "options"),
    [
        ("transformers4", {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
        ("transformers4", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("mlx", {"target_modules": ["q_proj"], "use_dora": True}),
        ("mlx", {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
)
def test_every_tensor_gets_the_name_of_the_checkpoint_and_back(stack: str, options: dict[str, Any]) -> None:
    adapted = get_peft_model(of_llava(), LoraConfig(**options, exclude_modules=".*vision.*"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    save_adapter(adapted, "adapter", stack=stack)
    (file,) = Path("adapter").glob("*.safetensors")
    names = [name.removeprefix("base_model.model.") for name in load_file(file)]
    assert all(name.startswith(("language_model.model.", "language_model.lm_head.")) for name in names)
    again = PeftModel.from_pretrained(of_llava(), "adapter")
    torch.testing.assert_close(again(IDS).logits, adapted(IDS).logits, atol=1e-6, rtol=1e-5)


def test_a_name_that_no_checkpoint_has_is_refused() -> None:
    model = base("qwen3_moe")
    checkpoint = {"model.layers.0.mlp.experts.0.middle_proj.weight": torch.zeros(8, 8)}
    write("adapter", checkpoint, checkpoint, rank=lambda _: 4)
    with pytest.raises(AdaptError, match="middle_proj"):
        PeftModel.from_pretrained(model, "adapter")
    assert not hasattr(model, "peft_config")


def test_magnitudes_of_dora_have_no_place_in_joined_weights() -> None:
    checkpoint = checkpoint_of(base("qwen3_moe"))
    write("adapter", checkpoint, filter(is_of_expert, checkpoint), rank=lambda _: 4, use_dora=True)
    tensors = load_file("adapter/adapter_model.safetensors")
    first = next(iter(tensors)).replace("lora_A.weight", "lora_magnitude_vector")
    save_file(tensors | {first: torch.ones(24)}, "adapter/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"magnitudes of DoRA at .*experts\.0\.down_proj"):
        PeftModel.from_pretrained(base("qwen3_moe"), "adapter")


def test_a_model_without_conversions_has_no_other_names() -> None:
    adapted = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(CheckpointError, match=r"Sequential .* has no other names"):
        save_adapter(adapted, "adapter", stack="transformers4")
    assert not Path("adapter").exists()
