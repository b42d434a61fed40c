"""Adaption prompts compute what PEFT's compute, also in attentions that PEFT doesn't know, and refuse all others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from models import VOCABULARY, equal
from peft.tuners.adaption_prompt import config as of_peft
from safetensors.torch import load_file
from torch import Tensor, nn

import graphpeft
from graphpeft import AdaptError, AdaptionPromptConfig, LoraConfig, PeftModel, get_peft_model
from graphpeft.methods.plain_attention import rotated
from graphpeft.testing import laws

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    # this Transformers has another name for it, the oldest has not
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
OPTIONS: dict[str, Any] = {"adapter_len": 4, "adapter_layers": 2}


def of(model: str, config: str, **sizes: Any) -> Callable[[], Any]:
    """Returns a function that builds a model whose weights are large enough to tell."""

    def make() -> Any:
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return made.eval()

    return make


MODELS: dict[str, Callable[[], Any]] = {
    "llama": of("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "mistral": of("MistralForCausalLM", "MistralConfig", **SIZES, num_key_value_heads=1, sliding_window=5),
    "gpt2": of(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        scale_attn_by_inverse_layer_idx=True,
    ),
}
PLAIN: dict[str, Callable[[], Any]] = {
    "qwen2": of("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "gemma": of("GemmaForCausalLM", "GemmaConfig", **GROUPED, head_dim=8),
    "mixtral": of("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=2),
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def moved(model: Any) -> Any:
    """Gives all that is trained other values, the same in both libraries, and returns the model in evaluation."""
    named = {name.replace("default.", "").removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(named.items()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    return model.eval()


def adapted(package: Any, model: Any, **options: Any) -> Any:
    torch.manual_seed(7)
    return package.get_peft_model(model, package.AdaptionPromptConfig(**OPTIONS | options)).eval()


def inputs(side: str = "left") -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask if side == "left" else mask.flip(1)}


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs() | more).logits


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# PEFT's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_model
def test_seeds_files_and_outputs_are_pefts(make: Callable[[], Any], dtype: torch.dtype, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for package in (graphpeft, peft):
        model = adapted(package, make().to(dtype), task_type="CAUSAL_LM")
        found[f"{package.__name__} draws"] = torch.rand(2)
        model.save_pretrained(str(tmp_path / package.__name__ / "fresh"))
        moved(model).save_pretrained(str(tmp_path / package.__name__ / "moved"))
        found[package.__name__] = model
    assert torch.equal(found["graphpeft draws"], found["peft draws"])
    ours, theirs = found["graphpeft"], found["peft"]
    expected = logits(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert not torch.allclose(expected, logits(make().to(dtype)), atol=0.1)
    for state in ("fresh", "moved"):
        mine, other = (tmp_path / name / state for name in ("graphpeft", "peft"))
        assert (mine / "adapter_config.json").read_text() == (other / "adapter_config.json").read_text()
        assert tensors_in(mine).keys() == tensors_in(other).keys()
        for key, tensor in tensors_in(other).items():
            assert tensors_in(mine)[key].dtype == tensor.dtype == dtype
            assert torch.equal(tensors_in(mine)[key], tensor)
    loaded = PeftModel.from_pretrained(make().to(dtype), tmp_path / "peft" / "moved").eval()
    in_peft = peft.PeftModel.from_pretrained(make().to(dtype), str(tmp_path / "graphpeft" / "moved")).eval()
    for result in (logits(ours), logits(loaded), logits(in_peft)):
        assert equal(result, expected)


@each_model
def test_a_fresh_adapter_is_in_the_last_layers_and_leaves_the_outputs_bit_for_bit(make: Callable[[], Any]) -> None:
    model = adapted(graphpeft, make())
    assert torch.equal(logits(model), logits(make()))
    keys = list(graphpeft.get_peft_model_state_dict(model))
    assert len(keys) == 4
    assert all(f".{layer}." in key for layer, key in zip((1, 1, 2, 2), keys, strict=True))


@each_model
def test_it_trains_as_pefts_does(make: Callable[[], Any]) -> None:
    losses = []
    for package in (graphpeft, peft):
        model = moved(adapted(package, make())).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.05)
        for side in ("left", "right", "left"):
            loss = model(**inputs(side), labels=inputs()["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert len(set(losses[:3])) == 3


@each_model
@pytest.mark.parametrize("cache", [True, False])
def test_generated_tokens_are_pefts(make: Callable[[], Any], cache: bool) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": cache}
    ours, theirs = (moved(adapted(package, make())) for package in (graphpeft, peft))
    found = ours.generate(**inputs(), **options)
    assert torch.equal(found, theirs.generate(**inputs(), **options))
    assert not torch.equal(found, make().generate(**inputs(), **options))


@pytest.mark.parametrize("name", PLAIN)
def test_other_models_of_this_shape_compute_what_peft_would(name: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(of_peft.TRANSFORMERS_MODEL_CONFIG, name, of_peft.TRANSFORMERS_MODEL_CONFIG["llama"])
    theirs = moved(adapted(peft, PLAIN[name](), target_modules="self_attn"))
    theirs.save_pretrained(str(tmp_path))
    ours = PeftModel.from_pretrained(PLAIN[name](), tmp_path).eval()
    assert equal(logits(ours), logits(theirs))


def test_a_layer_in_half_precision_can_be_widened() -> None:
    model = moved(adapted(graphpeft, MODELS["llama"]().bfloat16()))
    expected = logits(model)
    assert (logits(model.float()) - expected).abs().max() < 0.1 * expected.abs().max()


# several adapters


def test_adapters_are_switched_added_up_disabled_and_deleted() -> None:
    model: Any = moved(adapted(graphpeft, MODELS["llama"]()))
    base, first = logits(MODELS["llama"]()), logits(model)
    model.add_adapter("other", AdaptionPromptConfig(adapter_len=3, adapter_layers=3))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(moved(model))
    assert not torch.allclose(first, second, atol=0.1)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter(["default", "other"])
    both = logits(model)
    assert not torch.allclose(both, first, atol=0.1)
    assert not torch.allclose(both, second, atol=0.1)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), base)


def test_of_two_active_ones_in_one_layer_what_they_read_is_added_up() -> None:
    model: Any = moved(adapted(graphpeft, MODELS["llama"](), adapter_layers=1))
    model.add_adapter("other", AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    model.set_adapter("other")
    moved(model)
    attention = model.model.layers[-1].self_attn
    angles = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    given = {"hidden_states": torch.randn(2, 5, 32), "position_embeddings": (angles.cos(), angles.sin())}

    def read(*names: str) -> Tensor:
        model.set_adapter(list(names))
        with torch.no_grad():
            return attention(**given, attention_mask=None)[0]

    alone = read()
    assert torch.allclose(read("default", "other") - alone, read("default") + read("other") - 2 * alone, atol=1e-5)


@pytest.mark.parametrize("target", ["q_proj", "k_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("order", [1, -1])
def test_beside_lora_it_reads_what_the_changed_layers_compute(target: str, order: int) -> None:
    configs = [AdaptionPromptConfig(**OPTIONS), LoraConfig(r=2, target_modules=[target], init_lora_weights=False)]
    model: Any = get_peft_model(MODELS["llama"](), configs[::order][0], "first")
    model.add_adapter("second", configs[::order][1])
    model.set_adapter(["first", "second"])
    active = logits(moved(model))
    lora = "second" if order == 1 else "first"
    model.merge_adapter([lora])
    assert (logits(model) - active).abs().max() < 1e-4
    model.unmerge_adapter()
    assert torch.equal(logits(model), active)


def test_it_cannot_be_merged() -> None:
    model: Any = moved(adapted(graphpeft, MODELS["llama"]()))
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdaptError, match=r"layers\.1\.self_attn.* not weights"):
            merge()
    assert torch.equal(logits(model), before)


def test_rows_of_a_batch_cannot_differ_in_it_and_can_in_others() -> None:
    model: Any = moved(adapted(graphpeft, MODELS["llama"]()))
    with pytest.raises(AdaptError, match="can't be one of several in a batch"):
        model(**inputs(), adapter_names=["default", "__base__"])
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = model.generate(**inputs(), adapter_names=["lora", "__base__"], **options)
    for row, name in enumerate(("lora", None)):
        model.set_adapter([] if name is None else [name])
        assert torch.equal(found[row], model.generate(**inputs(), **options)[row])


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_beside_quantised_layers_it_is_pefts(kind: str) -> None:
    layers: Any = pytest.importorskip("bitsandbytes").nn
    options: dict[str, Any] = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {"quant_type": "nf4"}

    def make() -> Any:
        model = of("LlamaForCausalLM", "LlamaConfig", **GROUPED | {"hidden_size": 128})()
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                own = getattr(layer.self_attn, name)
                quantised = getattr(layers, kind)(own.in_features, own.out_features, bias=False, **options)
                quantised.load_state_dict(own.state_dict())
                setattr(layer.self_attn, name, quantised.to("cpu"))
        return model

    ours, theirs = (moved(adapted(package, make())) for package in (graphpeft, peft))
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert equal(logits(ours), logits(theirs))
    assert not equal(logits(ours), logits(make()))


# tools


@each_model
def test_compiled_copied_and_checkpointed_it_computes_and_trains_the_same(make: Callable[[], Any]) -> None:
    model = moved(adapted(graphpeft, make()))
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    compiled: Any = torch.compile(model, backend="aot_eager")
    assert equal(logits(compiled), expected)
    given = inputs() | {"labels": inputs()["input_ids"], "use_cache": False}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    plain = torch.autograd.grad(model(**given).loss, trained)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for found, wanted in zip(torch.autograd.grad(model(**given).loss, trained), plain, strict=True):
        torch.testing.assert_close(found, wanted)


def test_an_adapted_model_is_traced_and_exported(tmp_path: Path) -> None:
    model = moved(adapted(graphpeft, MODELS["llama"]()))
    given = {"input_ids": inputs()["input_ids"], "use_cache": False}
    with torch.no_grad():
        expected = model(**given).logits
        assert equal(graphpeft.trace(model, given)(**given).logits, expected)
    graphpeft.export(model, given, tmp_path / "model.pt2", format="pt2", adapters="baked")
    found = torch.export.load(tmp_path / "model.pt2").module()(**given)
    assert equal(found["logits"] if isinstance(found, dict) else found[0], expected)


# attentions of one's own


class Attention(nn.Module):
    """An attention without positions, which is for own models."""

    def __init__(self, size: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.head_dim = size // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(size, size) for _ in range(3))
        self.out_proj = nn.Linear(size, size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Normed(Attention):
    """One that norms what goes in."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(F.layer_norm(hidden_states, hidden_states.shape[-1:]))


class Pooling(Attention):
    """One that returns a value for each sequence."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).mean(1)


class Other(Attention):
    """One whose argument has another name."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Own(nn.Module):
    """A model with two attentions of one kind."""

    def __init__(self, kind: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(16, 16), kind()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(torch.tanh(self.first(x)))


def test_an_attention_of_ones_own_reads_learned_tokens() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(
        Own().eval(), AdaptionPromptConfig(target_modules="attention", adapter_len=3, adapter_layers=1)
    )
    moved(model)
    x = torch.randn(2, 5, 16)
    own = model.attention
    prompt, gate = own.default.adaption_prompt, own.default.adaption_gate
    with torch.no_grad(), model.disable_adapter():
        hidden = torch.tanh(model.first(x))
        q, k, v = (
            layer(given).unflatten(-1, (-1, 8)).transpose(1, 2)
            for layer, given in ((own.q_proj, hidden), (own.k_proj, prompt), (own.v_proj, prompt))
        )
        weights = gate * torch.softmax(q @ k.mT / 8**0.5, -1)
        expected = model(x) + own.out_proj((weights @ v).transpose(1, 2).flatten(2))
    with torch.no_grad():
        assert equal(model(x), expected)
        assert not equal(model(x), model.unload()(x))


def test_the_comparison_leaves_no_trace_in_the_model() -> None:
    model = PLAIN["qwen2"]().train()
    model.model.layers[1].eval()
    modes, before = [module.training for module in model.modules()], torch.get_rng_state()
    graphpeft.explain(model, AdaptionPromptConfig(target_modules="self_attn", **OPTIONS))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def refused(make: Callable[[], Any], name: str) -> str:
    model = make()
    before = laws.snapshot(model)
    with pytest.raises(AdaptError) as caught:
        get_peft_model(model, AdaptionPromptConfig(target_modules=name, adapter_len=3, adapter_layers=1))
    laws.require_unchanged(model, before, "a refused adaptation")
    return str(caught.value)


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "norms of queries": (
        of("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8),
        "self_attn",
        "a Qwen3Attention computes something else than its layers q_proj, k_proj, v_proj, o_proj tell",
    ),
    "another rotation": (of("CohereForCausalLM", "CohereConfig", **GROUPED), "self_attn", "a CohereAttention computes"),
    "another scale": (of("GraniteForCausalLM", "GraniteConfig", **GROUPED), "self_attn", "a GraniteAttention computes"),
    "clipped": (of("OlmoForCausalLM", "OlmoConfig", **GROUPED, clip_qkv=0.1), "self_attn", "a OlmoAttention computes"),
    "a part rotated": (of("NemotronForCausalLM", "NemotronConfig", **GROUPED), "self_attn", "rotates 50% of each head"),
    "no output layer": (of("PhiForCausalLM", "PhiConfig", **GROUPED), "self_attn", "it has no layers o_proj"),
    "fused": (of("Phi3ForCausalLM", "Phi3Config", **GROUPED), "self_attn", "it has no layers q_proj, k_proj, v_proj"),
    "a bias": (
        of("LlamaForCausalLM", "LlamaConfig", **GROUPED, attention_bias=True),
        "self_attn",
        "its o_proj adds a bias",
    ),
    "no head_dim": (of("BertModel", "BertConfig", **SIZES), "attention", "doesn't tell the size of a head"),
    "no hidden states": (lambda: Own(Other), "attention", "no argument hidden"),
    "norms of what goes in": (lambda: Own(Normed), "attention", "a Normed computes something else"),
    "pooling": (lambda: Own(Pooling), "attention", "a Pooling computes something else"),
    "another name": (MODELS["llama"], "attention", "no module is called 'attention'"),
}


@pytest.mark.parametrize(("make", "name", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_to_be_such_an_attention_is_refused(make: Callable[[], Any], name: str, words: str) -> None:
    assert words in refused(make, name)


def test_an_attention_to_another_sequence_is_refused() -> None:
    make = of("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    assert "an attention to another sequence" in refused(make, "crossattention")


def test_an_attention_in_a_flat_graph_is_refused() -> None:
    def make() -> Any:
        return graphpeft.trace(Own().eval(), (torch.randn(2, 5, 16),))

    assert "adapt the model itself, and trace it then" in refused(make, "attention")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter_len": None}, "adapter_len is None"),
        ({"adapter_layers": None}, "adapter_layers is None"),
        ({"adapter_layers": 4}, "adapter_layers is 4, for 3 modules 'self_attn'"),
    ],
)
def test_options_without_an_adapter_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AdaptError, match=words):
        adapted(graphpeft, MODELS["llama"](), **options)
    with pytest.raises(ValueError, match="adapter_layers must be a positive integer"):
        AdaptionPromptConfig(adapter_len=2, adapter_layers=0)


def test_a_model_of_another_type_has_no_default_name() -> None:
    with pytest.raises(AdaptError, match="there is no default for a model of type 'qwen2'"):
        adapted(graphpeft, PLAIN["qwen2"]())


def test_positions_for_a_part_of_each_head_are_refused_when_the_model_runs() -> None:
    angles = torch.randn(1, 5, 4)
    with pytest.raises(ValueError, match="rotates 50% of each head"):
        rotated(torch.randn(1, 2, 5, 8), (angles.cos(), angles.sin()))


def test_weights_without_values_do_not_tell_what_an_attention_computes() -> None:
    config = AdaptionPromptConfig(target_modules="attention", adapter_len=3, adapter_layers=1)
    with pytest.raises(AdaptError, match="its weights have no values"):
        get_peft_model(Own().to("meta"), config)
    with torch.device("meta"):
        model: Any = get_peft_model(MODELS["llama"](), AdaptionPromptConfig(**OPTIONS))
    assert model.get_nb_trainable_parameters()[0] == 2 * (4 * 32 + 1)
