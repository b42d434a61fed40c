"""Parts of fused projections, such as q and v alone, found in the graph or named by their rows; saved as stock LoRA."""

from __future__ import annotations

import copy
import re
from typing import Any

import peft
import pytest
import timm
import torch
import transformers
from torch import nn

from graphpeft import (
    AdaptError,
    CheckpointError,
    LoraConfig,
    PeftModel,
    explain,
    get_peft_model,
    hotswap_adapter,
    trace,
)
from graphpeft.stacks.peft_files import load
from graphpeft.testing import assert_copies_stay_adapted, laws

SMALL: dict[str, Any] = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]]), "use_cache": False}
PIXELS = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)

INTERLEAVED = {"q": ((0, 8), (24, 32)), "k": ((8, 16), (32, 40)), "v": ((16, 24), (40, 48))}
THIRDS = {"q": ((0, 16),), "k": ((16, 32),), "v": ((32, 48),)}
GROUPED = {"q": ((0, 16),), "k": ((16, 24),), "v": ((24, 32),)}


def text_model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **options)
    return getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(config).eval()


def gpt2() -> nn.Module:
    return text_model("GPT2", n_embd=16, n_head=2, n_layer=2)


def bloom() -> nn.Module:
    return text_model("Bloom", hidden_size=16, n_head=2, n_layer=1)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", embed_dim=16, depth=2, num_heads=2, img_size=32, num_classes=4)


LAYOUTS = {
    "gpt2": (gpt2, "c_attn", THIRDS),
    "bloom": (bloom, "query_key_value", INTERLEAVED),
    "gpt-neox": (
        lambda: text_model("GPTNeoX", hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16),
        "query_key_value",
        INTERLEAVED,
    ),
    "falcon": (
        lambda: text_model("Falcon", hidden_size=16, num_attention_heads=2, num_hidden_layers=1),
        "query_key_value",
        GROUPED,
    ),
    "phi3": (
        lambda: text_model(
            "Phi3",
            hidden_size=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=1,
            intermediate_size=16,
        ),
        "qkv_proj",
        GROUPED,
    ),
    "codegen": (
        lambda: text_model("CodeGen", n_embd=16, n_head=4, n_layer=1, rotary_dim=4, n_inner=16),
        "qkv_proj",
        {  # its layer has the values before the keys
            "q": ((0, 4), (12, 16), (24, 28), (36, 40)),
            "v": ((4, 8), (16, 20), (28, 32), (40, 44)),
            "k": ((8, 12), (20, 24), (32, 36), (44, 48)),
        },
    ),
}


@pytest.mark.parametrize(("build", "name", "expected"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("is_traced", [False, True], ids=["as it is", "traced"])
def test_the_graph_tells_which_rows_are_queries_keys_and_values(build, name, expected, is_traced):
    model = trace(build(), IDS) if is_traced else build()
    config = LoraConfig(target_modules=[name], target_parts={name: ["q", "k", "v"]})
    site: Any = explain(model, config, example_inputs=IDS).adapted[0].site
    assert dict(zip("qkv", site.parts, strict=True)) == expected


def adapted_vit(**options: Any) -> Any:
    config = LoraConfig(r=2, target_modules=["qkv"], **{"target_parts": {"qkv": ["q", "v"]}, **options})
    return get_peft_model(vit().eval(), config, example_inputs=PIXELS)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize(("build", "name", "inputs"), [(vit, "qkv", PIXELS), (gpt2, "c_attn", IDS)])
def test_stock_peft_loads_the_file_with_equal_outputs(tmp_path, build, name, inputs, rslora, patterns):
    own: dict[str, Any] = {"rank_pattern": {name: 3}, "alpha_pattern": {name: 5}} if patterns else {}
    config = LoraConfig(r=2, use_rslora=rslora, target_modules=[name], target_parts={name: ["q", "v"]}, **own)
    ours = laws.perturbed(get_peft_model(build(), config, example_inputs=inputs))
    ours.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="target_parts"):
        theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path))
    found, expected = laws.run(theirs.eval(), inputs), laws.run(ours.eval(), inputs)
    laws.require_close(getattr(found, "logits", found), getattr(expected, "logits", expected), 1e-6, "PEFT's outputs")


def test_only_the_rows_of_the_parts_change():
    model = laws.perturbed(adapted_vit())
    base, merged = vit(), copy.deepcopy(model).merge_and_unload()
    for name in ("blocks.0.attn.qkv", "blocks.1.attn.qkv"):
        change = merged.get_submodule(name).weight - base.get_submodule(name).weight
        assert (change[16:32] == 0).all()
        assert (change[:16] != 0).any()
        assert (change[32:] != 0).any()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * 2 * 16 + 2 * 2 * 16)


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_the_laws_hold_for_parts(init):
    config = LoraConfig(r=2, target_modules=["qkv"], target_parts={"qkv": [(0, 16), (32, 48)]}, init_lora_weights=init)
    if init is not False:
        laws.assert_fresh_adapter_changes_no_output(vit, config, PIXELS)
    laws.assert_only_the_adapter_is_trained(vit, config, PIXELS)
    laws.assert_adapted_is_base_with_delta(vit, config, PIXELS)
    laws.assert_saved_is_loaded(vit, config, PIXELS)
    laws.assert_dry_runs_change_nothing(vit, config, PIXELS)
    laws.assert_traced_is_adapted_alike(vit, config, PIXELS)
    assert_copies_stay_adapted(vit, config, PIXELS)


class Attending(nn.Module):
    """An attention of PyTorch's, which uses its fused projection as a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


def attending() -> nn.Module:
    torch.manual_seed(0)
    return Attending().eval()


SEQUENCE = (torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)),)
IN_PROJ = "attention.in_proj_weight"


def in_proj(parts: list[Any], **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_parameters=[IN_PROJ], target_parts={IN_PROJ: parts}, **options)


# PEFT uses the key, and looks for it among modules alone
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_rows_of_a_weight_that_is_used_as_such_are_parts_and_stock_lora_in_the_file(tmp_path):
    config = in_proj([[0, 8], [16, 24]])
    model = laws.perturbed(get_peft_model(attending(), config))
    merged = copy.deepcopy(model).merge_and_unload()
    change = merged.get_parameter(IN_PROJ) - attending().get_parameter(IN_PROJ)
    assert (change[8:16] == 0).all()
    assert (change[:8] != 0).any()
    assert (change[16:] != 0).any()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="target_parts"):
        theirs = peft.PeftModel.from_pretrained(attending(), str(tmp_path))
    laws.require_close(laws.run(theirs.eval(), SEQUENCE), laws.run(model, SEQUENCE), 1e-6, "PEFT's outputs")
    laws.assert_only_the_adapter_is_trained(attending, config, SEQUENCE)
    laws.assert_adapted_is_base_with_delta(attending, config, SEQUENCE)
    laws.assert_saved_is_loaded(attending, config, SEQUENCE)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (in_proj(["q"]), "its weight is used as such, .* name its rows"),
        (in_proj([[0, 8]], lora_dropout=0.1), "set lora_dropout=0"),
        (
            LoraConfig(target_modules=["attention"], target_parts={"attention": [(0, 8)]}),
            "its name stands for several weights; name the one with parts in target_parameters",
        ),
    ],
)
def test_what_has_no_parts_there_is_refused(config, reason):
    model = attending()
    before = laws.snapshot(model)
    with pytest.raises(AdaptError, match=reason):
        get_peft_model(model, config)
    laws.require_unchanged(model, before, "a failed adaptation")


def test_the_graph_tells_the_parts_where_another_adapter_acts_already():
    model = adapted_vit()
    config = LoraConfig(r=2, target_modules=["qkv"], target_parts={"qkv": ["k"]})
    model.add_adapter("second", config, example_inputs=PIXELS)
    model.set_adapter("second")
    assert [adapted.site.parts for adapted in model.adapter_report().adapted] == [(((16, 32),),)] * 2


def test_parts_that_are_named_are_swapped_with_example_inputs(tmp_path):
    laws.perturbed(adapted_vit()).save_pretrained(tmp_path)
    expected = laws.run(PeftModel.from_pretrained(vit(), tmp_path, example_inputs=PIXELS), PIXELS)
    for rank in (2, 3):
        model = adapted_vit(rank_pattern={"qkv": rank})
        hotswap_adapter(model, tmp_path, "default", example_inputs=PIXELS)
        laws.require_equal(laws.run(model, PIXELS), expected, "what is swapped")


def test_training_goes_on_from_a_file(tmp_path):
    model = laws.perturbed(adapted_vit())
    model.save_pretrained(tmp_path)
    assert load(tmp_path)["base_model.model.blocks.0.attn.qkv.lora_B.weight"].shape == (48, 4)
    again: Any = PeftModel.from_pretrained(vit(), tmp_path, is_trainable=True, example_inputs=PIXELS)
    assert again.peft_config["default"].rank_pattern == {}
    laws.require_equal(dict(again.named_parameters()), dict(model.named_parameters()), "what is loaded")


def test_a_file_whose_zeros_were_trained_is_loaded_as_stock_lora(tmp_path):
    adapted_vit().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({key: tensor + 1 for key, tensor in load(tmp_path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="isn't zero beside the parts' own rows and ranks"):
        PeftModel.from_pretrained(vit(), tmp_path, example_inputs=PIXELS)
    config_file = tmp_path / "adapter_config.json"
    config_file.write_text(re.sub(r'"target_parts": \{.*?\},', "", config_file.read_text(), flags=re.DOTALL))
    assert PeftModel.from_pretrained(vit(), tmp_path)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"qkv": [[0, 16], [8, 24]]}, "its parts overlap: row 8 is in two of them"),
        ({"qkv": ["q", [0, 4]]}, "its parts overlap: row 0 is in two of them"),
        ({"qkv": [[0, 49]]}, "rows 0 to 49 of a part aren't among its 48"),
        ({"qkv": [[4, 4]]}, "rows 4 to 4 of a part"),
        ({"qkv": ["query"]}, "there is no part 'query', but q, k, v"),
        ({"qvk": ["q"]}, r"target_parts names no target; near misses: .*qkv"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, reason):
    model = vit()
    before = laws.snapshot(model)
    with pytest.raises(AdaptError, match=reason):
        get_peft_model(model, LoraConfig(target_modules=["qkv"], target_parts=parts), example_inputs=PIXELS)
    laws.require_unchanged(model, before, "a failed adaptation")


def test_a_run_of_the_example_draws_no_random_numbers_and_counts_nowhere():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), Fused()).train()
    before, state = laws.snapshot(model), torch.get_rng_state()
    config = LoraConfig(target_modules=["qkv"], target_parts={"qkv": ["q"]})
    explain(model, config, example_inputs=(torch.ones(2, 3, 8),))
    assert torch.equal(torch.get_rng_state(), state)
    laws.require_unchanged(model, before, "explain")


def test_without_example_inputs_names_ask_for_them():
    config = LoraConfig(target_modules=["qkv"], target_parts={"qkv": ["q"]})
    with pytest.raises(AdaptError, match=r"example_inputs.*name its rows, as in target_parts="):
        get_peft_model(vit(), config)


def test_a_layer_that_is_no_projection_has_no_parts():
    config = LoraConfig(target_modules=["fc1"], target_parts={"fc1": ["q"]})
    with pytest.raises(AdaptError, match="its output isn't parted into q, k, v by views alone"):
        get_peft_model(vit(), config, example_inputs=PIXELS)


class Turned(nn.Module):
    """Attention that changes some features of its queries and keys, as for positions, and joins them to the others."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = (torch.cat([part[..., :2], part[..., 2:] * 2], -1) for part in self.qkv(x).chunk(3, -1))
        return torch.softmax(q @ k.mT, -1) @ v


def test_pieces_of_a_part_that_are_joined_are_no_scores():
    model = nn.Sequential(Turned())
    config = LoraConfig(target_modules=["qkv"], target_parts={"qkv": ["q", "k", "v"]})
    site: Any = explain(model, config, example_inputs=(torch.randn(2, 3, 8),)).adapted[0].site
    assert dict(zip("qkv", site.parts, strict=True)) == {"q": ((0, 8),), "k": ((8, 16),), "v": ((16, 24),)}


class Reversed(nn.Module):
    """Attention whose scores are keys times queries, turned around afterwards."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        k, q, v = self.qkv(x).chunk(3, -1)
        return (k @ q.mT).mT.softmax(-1) @ v


def test_scores_of_keys_times_queries_are_refused_and_not_guessed():
    config = LoraConfig(target_modules=["qkv"], target_parts={"qkv": ["q"]})
    with pytest.raises(AdaptError, match="doesn't take its queries, keys and values from one part each"):
        get_peft_model(nn.Sequential(Reversed()), config, example_inputs=(torch.randn(2, 3, 8),))


class Fused(nn.Module):
    """Attention of one fused projection."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


class OverQueries(nn.Module):
    """Attention with a column of scores for each query, so that its softmax goes over the last dimension but one."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        k, q, v = self.qkv(x).chunk(3, -1)
        return (k @ q.mT).softmax(-2).mT @ v


def test_scores_with_a_column_for_each_query_are_refused_and_not_guessed():
    config = LoraConfig(target_modules=["qkv"], target_parts={"qkv": ["q"]})
    with pytest.raises(AdaptError, match="no attention that tells its queries from its keys and values"):
        get_peft_model(nn.Sequential(OverQueries()), config, example_inputs=(torch.randn(2, 3, 8),))
