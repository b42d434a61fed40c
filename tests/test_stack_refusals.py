"""Adapters that another library's files can't hold are refused by name, and damaged files of theirs are, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from graphpeft import (
    AdaptError,
    CheckpointError,
    LoraConfig,
    PeftModel,
    adapter_tensors,
    check_serving,
    get_peft_model,
    save_adapter,
)

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def llama(is_tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=is_tied)
    return transformers.LlamaForCausalLM(config).eval()


def qwen() -> Any:
    torch.manual_seed(0)
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **experts)).eval()


def dino() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Dinov2Config(**sizes, use_swiglu_ffn=True, image_size=28, patch_size=14)
    return transformers.Dinov2Model(config).eval()


def trained(model: nn.Module, **options: Any) -> Any:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


OF_OTHER_MEANINGS: dict[str, tuple[dict[str, Any], str]] = {
    "first values of the base's": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "tokens that invoke it": ({"alora_invocation_tokens": [9], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
    "biases of factors": ({"lora_bias": True, "alpha_pattern": {"down_proj": 2}}, "lora_bias=True"),
    "more layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
}


@pytest.mark.parametrize("stack", ["plain", "mlx"])
@pytest.mark.parametrize("case", OF_OTHER_MEANINGS)
def test_factors_of_another_meaning_are_refused(case: str, stack: str):
    """Fails if an option that such files don't have is dropped, by which the outputs become others."""
    options, reason = OF_OTHER_MEANINGS[case]
    adapted = trained(llama(), **options)
    with pytest.raises(CheckpointError, match=reason):
        save_adapter(adapted, "saved", stack=stack)
    assert not Path("saved").exists()


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Conv2d(4, 8, 3)
        self.down_proj = nn.Linear(8, 8)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.MultiheadAttention(8, 2, batch_first=True)
        self.down_proj = nn.Linear(8, 8)


@pytest.mark.parametrize("stack", ["plain", "mlx"])
@pytest.mark.parametrize("model", [Convolution, Attention])
def test_factors_of_no_plain_layer_are_refused(model: Callable[[], nn.Module], stack: str):
    """Fails if a kernel's height is taken for a rank, or the path inside of a wrapped module is shortened."""
    adapted = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with pytest.raises(CheckpointError, match="q_proj"):
        save_adapter(adapted, "saved", stack=stack)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_table_that_mlx_has_otherwise_is_refused():
    with pytest.raises(CheckpointError, match=r"embed_tokens is tied"):
        save_adapter(trained(llama(is_tied=True), target_modules=["embed_tokens"]), "saved", stack="mlx")
    with pytest.raises(CheckpointError, match="a magnitude for each row"):
        save_adapter(trained(llama(), target_modules=["embed_tokens"], use_dora=True), "saved", stack="mlx")


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize(("kind", "layer"), [("gpt2", "c_attn"), ("gpt_neox", "query_key_value"), ("gptj", "q_proj")])
def test_names_that_mlx_changes_are_refused(kind: str, layer: str):
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 60}
    sizes |= {"rotary_dim": 4} if kind == "gptj" else {}
    config = transformers.CONFIG_MAPPING[kind](**sizes)
    model = trained(transformers.AutoModelForCausalLM.from_config(config), target_modules=[layer])
    with pytest.raises(CheckpointError, match=f"mlx-lm has other names .*{layer} of {kind}, and would ignore"):
        save_adapter(model, "saved", stack="mlx")
    assert not Path("saved").exists()


def test_a_layer_that_mlx_has_as_two_is_refused():
    ranks: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
    ranks |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    config = transformers.DeepseekV3Config(**SIZES, **ranks, first_k_dense_replace=2)
    model = trained(transformers.DeepseekV3ForCausalLM(config), target_modules=["kv_b_proj", "o_proj"])
    with pytest.raises(CheckpointError, match=r"mlx-lm has other names .*kv_b_proj of deepseek_v3"):
        save_adapter(model, "saved", stack="mlx")


def test_a_part_of_a_matrix_of_the_checkpoint_is_refused():
    with pytest.raises(CheckpointError, match=r"gate_proj is another matrix, or a part of one.*weights_in"):
        save_adapter(trained(dino(), target_modules=["gate_proj"]), "saved", stack="transformers4")


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "a scale of 0 first": (llama, {"alpha_pattern": {"q_proj": 0}}),
    "one of two layers": (llama, {"target_modules": ["layers.1.self_attn.q_proj"]}),
    "an expression": (llama, {"target_modules": r".*layers\.1.*q_proj"}),
    "patterns": (llama, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 2}}),
    "one layer's experts": (qwen, {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.down_proj"]}),
    "a router": (qwen, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
}


@pytest.mark.parametrize("stack", ["plain", "mlx"])
@pytest.mark.parametrize("case", KINDS)
def test_targets_mean_the_same_layers_when_they_are_read(case: str, stack: str):
    """Fails if a name is written that means other layers, too, or a division by a scale of 0 is left."""
    make, options = KINDS[case]
    adapted = trained(make(), **options)
    save_adapter(adapted, "saved", stack=stack)
    again = PeftModel.from_pretrained(make(), "saved")
    torch.testing.assert_close(again(IDS).logits, adapted(IDS).logits, atol=1e-6, rtol=1e-5)
    assert not torch.equal(again(IDS).logits, make()(IDS).logits)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc: Any = nn.Module()
        self.enc.base_layers = nn.ModuleList([nn.Linear(8, 8)])
        self.encs = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encs[0](torch.tanh(self.enc.base_layers[0](x)))


@pytest.mark.parametrize("stack", ["plain", "mlx"])
def test_a_module_may_be_called_like_a_wrapper(stack: str):
    """Fails if `.base_layer` is cut out of a path: then another layer gets the change."""
    adapted, x = trained(Inner(), target_modules="enc.base_layers.0"), torch.ones(2, 8)
    save_adapter(adapted, "saved", stack=stack)
    assert torch.equal(PeftModel.from_pretrained(Inner(), "saved")(x), adapted(x))


@pytest.mark.parametrize("stack", ["peft", "plain", "mlx"])
def test_an_edited_option_is_refused_as_in_save_pretrained(stack: str):
    adapted = trained(llama())
    adapted.peft_config["default"].lora_alpha = 64
    with pytest.raises(AdaptError, match="lora_alpha of 'default' was 6"):
        save_adapter(adapted, "saved", stack=stack)


def test_the_checksum_is_another_one_with_another_scale():
    one, other = trained(llama()), trained(llama(), lora_alpha=7)
    assert adapter_tensors(one).checksum != adapter_tensors(other).checksum


_FIRST = "base_model.model.model.layers.0.mlp.experts.0.gate_proj"
_A, _B = f"{_FIRST}.lora_A.weight", f"{_FIRST}.lora_B.weight"

DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "a column": (lambda t: {_A: t[_A][:, :1]}, r"have the shapes \(4, 1\)"),
    "a row": (lambda t: {_B: t[_B][:1]}, r"\(1, 4\), where the model wants"),
    "a rank": (lambda t: {_A: t[_A][:2], _B: t[_B][:, :2]}, "have other ranks than the config says"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_experts_is_refused(damage: str):
    """Fails if numbers are repeated to fill a factor."""
    save_adapter(trained(qwen(), target_parameters=STACKS), "saved", stack="transformers4")
    tensors = load_file("saved/adapter_model.safetensors")
    change, reason = DAMAGES[damage]
    changed = {name: tensor.contiguous() for name, tensor in change(tensors).items()}
    save_file({**tensors, **changed}, "saved/adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=reason):
        PeftModel.from_pretrained(qwen(), "saved")


@pytest.mark.parametrize("part", ["layers.0.self_attn.q_proj", "layers.1.mlp.experts.2.up_proj"])
def test_a_file_that_lacks_what_its_config_names_is_refused(part: str):
    """Fails if targets are told anew by the tensors that are there."""
    save_adapter(trained(qwen(), target_parameters=STACKS), "saved", stack="transformers4")
    tensors = load_file("saved/adapter_model.safetensors")
    there = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(there) == len(tensors) - 2
    save_file(there, "saved/adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks model.{part}"):
        PeftModel.from_pretrained(qwen(), "saved")


def test_files_of_mlx_with_another_config_are_refused():
    """Fails if a process that was killed between two moves leaves an adapter that is neither."""
    for alpha, folder in ((4, "one"), (40, "two")):
        save_adapter(trained(llama(), lora_alpha=alpha), folder, stack="mlx")
    Path("two/adapters.safetensors").replace("one/adapters.safetensors")
    with pytest.raises(CheckpointError, match="was saved with another"):
        PeftModel.from_pretrained(llama(), "one")


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("options", [{"init_lora_weights": "lora_ga"}, {"alora_invocation_tokens": [9]}])
def test_a_server_does_not_compute_another_function_of_the_factors(options: dict[str, Any], server: str):
    trained(llama(), task_type="CAUSAL_LM").save_pretrained("saved")
    config = LoraConfig.from_pretrained("saved")
    for name, value in options.items():
        setattr(config, name, value)
    config.save_pretrained("saved")
    save_file(load_file("saved/adapter_model.safetensors"), "saved/adapter_model.safetensors", {"format": "pt"})
    report = check_serving("saved", server)
    assert not report.is_served
    assert next(iter(options)) in str(report)
