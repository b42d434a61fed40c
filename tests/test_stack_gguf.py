"""llama.cpp's files: what its formulas make of them is the adapter's change, by the names and rows of the base's file.

`make stacks` runs llama.cpp itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from models import tiny_experts, tiny_llama
from safetensors.torch import load_file
from torch import Tensor, nn

from graphpeft import CheckpointError, LoHaConfig, LoraConfig, PeftModel, get_peft_model, save_adapter
from graphpeft.command import main
from graphpeft.stacks.reading import read_for

IDS = torch.tensor([[3, 7, 11, 2, 9, 23]])
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def llama() -> Any:
    torch.manual_seed(0)
    return tiny_llama().eval()


def qwen_moe() -> Any:
    return tiny_experts("eager")


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    config.tie_word_embeddings = False
    return transformers.GPT2LMHeadModel(config).eval()


def of_llama(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns weights by llama.cpp's names, each with the order of rows in which llama.cpp has it."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {"token_embd.weight": model.model.embed_tokens.weight, "output.weight": model.lm_head.weight}
    for number, layer in enumerate(model.model.layers):
        for name, path in LAYER.items():
            own = dict(layer.named_parameters()).get(f"{path}.weight")
            if own is not None:
                found[f"blk.{number}.{name}.weight"] = own
        if hasattr(layer.mlp, "experts"):
            gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
            stacks = {"gate": gate, "up": up, "down": layer.mlp.experts.down_proj}
            found |= {f"blk.{number}.ffn_{name}_exps.weight": stack for name, stack in stacks.items()}
    is_turned = config.model_type == "llama"

    def rows(name: str, size: int) -> Tensor:
        count = heads.get(name.split(".")[-2], 0) if is_turned else 0
        order = torch.arange(size)
        # halves of a head's rotation are interleaved: LlamaModel.permute in llama.cpp's converter
        return order.view(count, 2, -1).transpose(1, 2).flatten() if count else order

    return {name: (own.detach(), rows(name, own.shape[-2])) for name, own in found.items()}


def of_gpt2(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    block = model.transformer.h[0]
    turned = {"attn_qkv": block.attn.c_attn, "attn_output": block.attn.c_proj, "ffn_up": block.mlp.c_fc}
    found = {f"blk.0.{name}.weight": layer.weight.detach().T for name, layer in turned.items()}
    found |= {
        "token_embd.weight": model.transformer.wte.weight.detach(),
        "output.weight": model.lm_head.weight.detach(),
    }
    return {name: (own, torch.arange(len(own))) for name, own in found.items()}


def write_base(
    model: Any,
    architecture: str,
    weights: Mapping[str, tuple[Tensor, Tensor]],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    path: str = "base.gguf",
    **options: Any,
) -> None:
    """Writes a model's weights as llama.cpp's converter does."""
    writer = GGUFWriter(path, architecture, **options)
    writer.add_block_count(model.config.num_hidden_layers)
    for name, (own, rows) in weights.items():
        ordered = own.index_select(-2, rows).contiguous().numpy()
        fitting = kind if ordered.shape[-1] % 32 == 0 else GGMLQuantizationType.F32  # as llama.cpp's converter does
        writer.add_tensor(name, quants.quantize(ordered, fitting), raw_dtype=fitting)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FAMILIES: dict[str, tuple[Callable[[], Any], str, Callable[[Any], Any]]] = {
    "llama": (llama, "llama", of_llama),
    "qwen_moe": (qwen_moe, "qwen3moe", of_llama),
    "gpt2": (gpt2, "gpt2", of_gpt2),
}


def based(family: str, **options: Any) -> Any:
    """Returns a model whose base is written as base.gguf."""
    make, architecture, weights = FAMILIES[family]
    model = make()
    write_base(model, architecture, weights(model), **options)
    return model


def trained(model: Any, config: Any) -> Any:
    """Returns a model whose adapter has any values."""
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapted.eval()


def as_llama_cpp_computes(model: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]], path: str) -> nn.Module:
    """Returns a model with the change of a file by the formulas of llama.cpp, ``build_lora_mm`` and others."""
    reader = GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {each.name: torch.tensor(each.data) for each in reader.tensors}
    for name in {key.rpartition(".lora_")[0] for key in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        own, rows = weights[name]
        change = (a @ b.T if name == "token_embd.weight" else b @ a) * (alpha / b.shape[-1])
        assert change.shape == own.shape
        own.copy_(own + change.index_select(-2, torch.argsort(rows)))  # a view of the model's parameter
    return model


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}),
    "patterns": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
    ),
    "rsLoRA": ("llama", {"r": 4, "use_rslora": True, "target_modules": ["k_proj"], "rank_pattern": {"layers.0.*": 8}}),
    "embeddings": ("llama", {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}),
    "the head": ("llama", {"r": 2, "target_modules": ["lm_head"]}),
    "experts": (
        "qwen_moe",
        {"r": 2, "target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj", "mlp.gate"]}
        | {"rank_pattern": {"q_proj": 3}},
    ),
    "Conv1D": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_fc", "attn.c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_the_adapter_does_and_its_file_is_read_again(name: str) -> None:
    family, options = CONFIGS[name]
    make, _, weights = FAMILIES[family]
    model = trained(based(family), LoraConfig(**options))
    save_adapter(model, "adapter", stack="gguf", served_base="base.gguf")
    expected = model(IDS).logits
    served = make()
    found = as_llama_cpp_computes(served, weights(served), "adapter/adapter.gguf")(IDS).logits
    assert (expected - make()(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["LoRA", "embeddings", "Conv1D"])
def test_a_file_of_llama_cpp_is_read_bit_for_bit_by_the_command(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, options = CONFIGS[name]
    monkeypatch.setattr("test_stack_gguf.base", FAMILIES[family][0], raising=False)
    trained(based(family), LoraConfig(**options)).save_pretrained("peft")
    both = ["--base", "test_stack_gguf:base", "--served-base", "base.gguf"]
    assert main(["convert", "peft", "adapter", "--to", "gguf", *both]) == 0, capsys.readouterr()
    assert main(["convert", "adapter/adapter.gguf", "again", "--to", "peft", *both]) == 0, capsys.readouterr()
    given, found = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("peft", "again"))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)
    assert main(["convert", "peft", "mlx", "--to", "mlx", *both]) == 2
    assert "--served-base is of an adapter for llama.cpp" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_the_rows_of_a_quantised_base_are_recognised(kind: str) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    files = {}
    for each in ("F32", kind):
        model = trained(based("llama", kind=GGMLQuantizationType[each]), config)
        save_adapter(model, each, stack="gguf", served_base="base.gguf")
        files[each] = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(f"{each}/adapter.gguf").tensors}
    assert all(np.array_equal(files[kind][name], of_exact) for name, of_exact in files["F32"].items())


def test_rows_that_are_alike_are_told_apart_or_refused() -> None:
    config, alike = LoraConfig(r=2, target_modules=["q_proj"]), 0.01 + 1e-4 * torch.randn(32, 32)
    for weight in (alike, torch.full((32, 32), 0.01)):
        model, served = llama(), llama()
        for layer in (*model.model.layers, *served.model.layers):
            layer.self_attn.q_proj.weight.data.copy_(weight)
        write_base(served, "llama", of_llama(served))
        adapted = trained(model, config)
        expected = adapted(IDS).logits
        if weight is alike:
            save_adapter(adapted, "adapter", stack="gguf", served_base="base.gguf")
            found = as_llama_cpp_computes(served, of_llama(served), "adapter/adapter.gguf")(IDS).logits
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        else:
            with pytest.raises(CheckpointError, match="or rows that are alike"):
                save_adapter(adapted, "other", stack="gguf", served_base="base.gguf")


def test_a_base_in_several_files_is_named_by_any_of_them() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = trained(based("llama"), config)
    write_base(model.get_base_model(), "llama", of_llama(llama()), split_max_tensors=5)
    parts = sorted(Path().glob("base-*-of-*.gguf"))
    assert len(parts) > 2
    for name, base in [("whole", "base.gguf"), ("first", parts[0]), ("last", parts[-1])]:
        save_adapter(model, name, stack="gguf", served_base=base)
    whole, *others = (Path(name, "adapter.gguf").read_bytes() for name in ("whole", "first", "last"))
    assert all(other == whole for other in others)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"base-00001-of-00004\.gguf can't be read: .*base-00002-of"):
        save_adapter(model, "other", stack="gguf", served_base=parts[0])


def _write_adapter(
    tensors: Mapping[str, Tensor], architecture: str, alpha: float = 4.0, invoked: tuple[int, ...] = ()
) -> None:
    writer = GGUFWriter("other.gguf", architecture)
    if invoked:
        writer.add_array("adapter.alora.invocation_tokens", invoked)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("family", "tensor", "change"),
    [
        ("llama", "blk.0.attn_q.weight", lambda a, b: (a[:, 1:], b)),
        ("llama", "token_embd.weight", lambda a, b: (a[1:], b)),
        ("qwen_moe", "blk.0.ffn_down_exps.weight", lambda a, b: (a[1:], b[1:])),
        ("qwen_moe", "blk.0.ffn_down_exps.weight", lambda a, b: (a[1:], b)),
        ("qwen_moe", "blk.0.ffn_down_exps.weight", lambda a, b: (a[0], b[0])),
    ],
)
def test_factors_of_other_sizes_than_the_base_has_are_refused(
    family: str,
    tensor: str,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("test_stack_gguf.base", FAMILIES[family][0], raising=False)
    _, architecture, weights = FAMILIES[family]
    own, _ = weights(based(family))[tensor]
    *stacked, rows, columns = own.shape
    is_table = tensor == "token_embd.weight"
    a = torch.randn(rows, 2) if is_table else torch.randn(*stacked, 2, columns)
    b = torch.randn(*stacked, columns if is_table else rows, 2)
    both = ["--base", "test_stack_gguf:base", "--served-base", "base.gguf"]
    for found, code in [((a, b), 0), (change(a, b), 1)]:
        factors = {f"{tensor}.lora_{name}": each.contiguous() for name, each in zip("ab", found, strict=True)}
        _write_adapter(factors, architecture)
        assert main(["convert", "other.gguf", f"read-{code}", "--to", "peft", *both]) == code
    assert f"{tensor} has factors of shapes" in capsys.readouterr().err
    assert not Path("read-1").exists()


@pytest.mark.parametrize(
    ("architecture", "options", "nan", "reason"),
    [
        ("llama", {}, True, r"attn_q\.weight\.lora_a has numbers that aren't finite"),
        ("llama", {"alpha": float("inf")}, False, "adapter.lora.alpha=inf is no number"),
        ("llama", {"invoked": (3, 4)}, False, r"acts after the tokens \[3, 4\] alone"),
        ("deepseek2", {}, False, "graph of deepseek2 would ignore factors of blk.0.attn_q.weight"),
    ],
)
def test_a_file_that_means_something_else_is_refused(
    architecture: str, options: dict[str, Any], nan: bool, reason: str
) -> None:
    model = llama()
    write_base(model, architecture, of_llama(model))
    a = torch.full((2, 32), torch.nan) if nan else torch.randn(2, 32)
    name = "blk.0.attn_q.weight"
    _write_adapter({f"{name}.lora_a": a, f"{name}.lora_b": torch.randn(32, 2)}, architecture, **options)
    with pytest.raises(CheckpointError, match=reason):
        read_for(model, "other.gguf", served_base="base.gguf")


@pytest.mark.parametrize("change", ["tied", "other tokens", "another"])
def test_a_file_for_another_table_is_refused(change: str) -> None:
    model = llama()
    weights = of_llama(model)
    table, rows = weights["token_embd.weight"]
    if change == "tied":
        del weights["output.weight"]
    else:
        weights["token_embd.weight"] = (table, rows.flip(0)) if change == "other tokens" else (table.roll(1, 1), rows)
    write_base(model, "llama", weights)
    factors = {"a": torch.randn(len(table), 2), "b": torch.randn(32, 2)}
    _write_adapter({f"token_embd.weight.lora_{key}": each for key, each in factors.items()}, "llama")
    with pytest.raises(CheckpointError, match=r"ties the head|in another order|has other numbers"):
        read_for(model, "other.gguf", served_base="base.gguf")


def _another(weights: dict[str, Any]) -> None:
    weights["blk.0.attn_q.weight"] = torch.randn_like(weights["blk.0.attn_q.weight"][0]), torch.arange(32)


def _scaled(weights: dict[str, Any]) -> None:
    own, rows = weights["blk.0.attn_q.weight"]
    weights["blk.0.attn_q.weight"] = own * 0.5, rows


def _cut(weights: dict[str, Any]) -> None:
    own, _ = weights["blk.0.attn_q.weight"]
    weights["blk.0.attn_q.weight"] = own[:16], torch.arange(16)


def _joined(weights: dict[str, Any]) -> None:
    del weights["blk.0.attn_q.weight"]


def _tied(weights: dict[str, Any]) -> None:
    del weights["output.weight"]


def _other_tokens(weights: dict[str, Any]) -> None:
    own, rows = weights["token_embd.weight"]
    weights["token_embd.weight"] = own, rows.flip(0)


Q, TABLE, HEAD = (LoraConfig(r=2, target_modules=[name]) for name in ("q_proj", "embed_tokens", "lm_head"))


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (_another, Q, r"attn_q\.weight of shape .* has other numbers than the model's .*q_proj"),
        (_scaled, Q, "has other numbers than the model's"),
        (_cut, Q, r"of shape \(16, 32\) has other numbers than the model's .* of shape \(32, 32\)"),
        (_joined, Q, r"no blk\.0\.attn_q\.weight, which model\.layers\.0\.self_attn\.q_proj is: it may have it joined"),
        (_tied, HEAD, r"no output\.weight, which lm_head is: it ties the head to the table"),
        (_tied, TABLE, "would take the table's factors for the head's"),
        (_other_tokens, TABLE, "has the rows of model.embed_tokens in another order"),
    ],
)
def test_a_base_that_has_no_place_for_the_change_is_refused(change: Any, config: Any, reason: str) -> None:
    model = llama()
    weights = of_llama(model)
    change(weights)
    write_base(model, "llama", weights)
    with pytest.raises(CheckpointError, match=reason):
        save_adapter(trained(model, config), "adapter", stack="gguf", served_base="base.gguf")
    assert not Path("adapter").exists()


def test_a_place_whose_factors_llama_cpp_would_ignore_is_refused() -> None:
    model = gpt2()
    position = {"position_embd.weight": (model.transformer.wpe.weight.detach(), torch.arange(32))}
    write_base(model, "gpt2", of_gpt2(model) | position)
    adapted = trained(model, LoraConfig(r=2, target_modules=["wpe"]))
    with pytest.raises(CheckpointError, match=r"graph of gpt2 would ignore factors of position_embd\.weight, which tr"):
        save_adapter(adapted, "adapter", stack="gguf", served_base="base.gguf")
    model = llama()
    write_base(model, "deepseek2", of_llama(model))
    for name, is_used in [("q_proj", False), ("lm_head", False), ("gate_proj", True)]:
        adapted = trained(llama(), LoraConfig(r=2, target_modules=[name]))
        with contextlib.nullcontext() if is_used else pytest.raises(CheckpointError, match="deepseek2 would ignore"):
            save_adapter(adapted, f"adapter-{name}", stack="gguf", served_base="base.gguf")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoHaConfig(r=2, target_modules=["q_proj"]), "llama.cpp reads LoRA, and this is an adapter of LOHA"),
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "no place for model.layers.0.self_attn.q_proj"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), r"no place for .*lm_head\.weight"),
        (LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1]), "no place for .*token_adapter"),
    ],
)
def test_a_kind_that_llama_cpp_does_not_read_is_refused(config: Any, reason: str) -> None:
    model = trained(based("llama"), config)
    with pytest.raises(CheckpointError, match=reason):
        save_adapter(model, "adapter", stack="gguf", served_base="base.gguf")
    assert not Path("adapter").exists()


def test_what_is_given_must_be_a_base_and_an_adapter_of_it() -> None:
    model = trained(based("llama"), LoraConfig(**CONFIGS["LoRA"][1]))
    with pytest.raises(CheckpointError, match=r"give its GGUF file as served_base"):
        save_adapter(model, "adapter", stack="gguf")
    with pytest.raises(CheckpointError, match="mlx-lm serves the checkpoint itself; leave out served_base"):
        save_adapter(model, "adapter", stack="mlx", served_base="base.gguf")
    with pytest.raises(CheckpointError, match=r"none\.gguf can't be read: .*No such file"):
        save_adapter(model, "adapter", stack="gguf", served_base="none.gguf")
    save_adapter(model, "adapter", stack="gguf", served_base="base.gguf")
    with pytest.raises(CheckpointError, match="is no model of an architecture"):
        save_adapter(model, "other", stack="gguf", served_base="adapter/adapter.gguf")
    with pytest.raises(CheckpointError, match="give its GGUF file as served_base"):
        PeftModel.from_pretrained(llama(), "adapter")
    with pytest.raises(CheckpointError, match=r"base.gguf is no adapter of LoRA: it has general.type=None"):
        PeftModel.from_pretrained(llama(), "base.gguf")
    Path("base.gguf").write_bytes(Path("base.gguf").read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"base\.gguf is no GGUF file, or a damaged one"):
        save_adapter(model, "other", stack="gguf", served_base="base.gguf")
    assert not Path("other").exists()
