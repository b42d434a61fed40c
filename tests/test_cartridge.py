"""Cartridges begin as the keys and values of a text, are PEFT's in files, and are composed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import GPT2, LLAMA, VOCABULARY, equal
from oracle import moved
from peft.tuners.cartridge import utils as of_peft
from safetensors.torch import load_file
from torch import Tensor

import graphpeft
from graphpeft import AdaptError, CartridgeConfig, PeftModel, get_peft_model
from graphpeft.testing import laws

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    # PEFT calls caches by their old name
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

TEXT = "It begins with this."
QUESTION = torch.tensor([[5, 9, 7, 30, 4]])
OPTIONS: Any = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6, "num_frozen_tokens": 2}
each_model = pytest.mark.parametrize("example", [LLAMA, GPT2], ids=str)


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, max_length: int | None = None, **_: Any) -> dict[str, Tensor]:
        ids = torch.tensor([[3 + ord(letter) % (VOCABULARY - 3) for letter in text]])
        return {"input_ids": ids[:, :max_length]}


class Chat(Letters):
    """A tokenizer of letters with a template for chats."""

    def apply_chat_template(self, messages: list[dict[str, str]], return_tensors: str, **_: Any) -> Tensor:
        return self("".join(f"<{each['role']}>{each['content']}" for each in messages))["input_ids"]


class ChatWithoutSystem(Letters):
    """A tokenizer of letters whose template knows no message of a system."""

    def apply_chat_template(self, *_: Any, **__: Any) -> Tensor:
        raise ValueError("there is no such role")


def adapted(package: Any, example: Any = LLAMA, **options: Any) -> Any:
    model = example.build()
    torch.manual_seed(3)
    return package.get_peft_model(model, package.CartridgeConfig(**OPTIONS | options)).eval()


def ids_of(text: str) -> Tensor:
    return Letters()(text)["input_ids"]


def cache_of(model: Any, ids: Tensor) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True).past_key_values


def tokens_in(folder: Path) -> Tensor:
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def logits(model: Any, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(**({"input_ids": QUESTION} | given)).logits


# what is trained


@pytest.mark.parametrize("frozen", [0, 1, 6])
def test_the_first_tokens_stay_as_they_are_whatever_the_optimizer_does(frozen: int, tmp_path: Path) -> None:
    model = adapted(graphpeft, num_frozen_tokens=frozen)
    model.save_pretrained(tmp_path / "before")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(map(torch.Tensor.numel, trained)) == (6 - frozen) * 64
    if trained:
        optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
        model(input_ids=QUESTION, labels=QUESTION).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "after")
    before, after = tokens_in(tmp_path / "before"), tokens_in(tmp_path / "after")
    assert torch.equal(before[:frozen], after[:frozen])
    assert not torch.isclose(before[frozen:], after[frozen:]).any()


@pytest.mark.parametrize("frozen", [0, 1, 6])
def test_seeds_files_and_outputs_are_pefts(frozen: int, tmp_path: Path) -> None:
    ours, theirs = adapted(graphpeft, num_frozen_tokens=frozen), adapted(peft, num_frozen_tokens=frozen)
    drawn = []
    for package in (graphpeft, peft):
        adapted(package, num_frozen_tokens=frozen)
        drawn.append(torch.rand(2))
    assert torch.equal(*drawn)
    assert equal(logits(ours), logits(theirs))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    configs = [(tmp_path / folder / "adapter_config.json").read_text() for folder in ("ours", "theirs")]
    assert configs[0] == configs[1]
    assert torch.equal(tokens_in(tmp_path / "ours"), tokens_in(tmp_path / "theirs"))
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() == {"prompt_embeddings"}


def test_a_cartridge_of_pefts_is_trained_on_in_its_parts(tmp_path: Path) -> None:
    adapted(peft).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(LLAMA.build(), tmp_path, is_trainable=True)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"prompt_encoder.default.trainable_embedding": (4, 64)}


# first values


@each_model
def test_a_text_in_a_cartridge_does_what_the_text_in_front_does(example: Any) -> None:
    base = example.build()
    ids = ids_of(TEXT)
    expected = logits(base, input_ids=torch.cat((ids, QUESTION), dim=1))[:, -5:]
    model = get_peft_model(base, CartridgeConfig(**OPTIONS | {"num_virtual_tokens": ids.shape[1]}))
    assert not equal(logits(model), expected)
    graphpeft.initialize_kv_prefix_from_text(model, Letters(), text=TEXT)
    assert (logits(model) - expected).abs().max() < 1e-5


@each_model
@pytest.mark.parametrize("tokenizer", [Letters(), Chat(), ChatWithoutSystem()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("options", [{}, {"max_length": 9}, {"use_chat_template": False}], ids=str)
def test_the_first_values_by_a_text_are_pefts(example: Any, tokenizer: Any, options: Any, tmp_path: Path) -> None:
    returned = []
    for package in (graphpeft, peft):
        model = adapted(package, example)
        functions: Any = graphpeft if package is graphpeft else of_peft
        returned.append(functions.initialize_kv_prefix_from_text(model, tokenizer, text=TEXT, **options))
        model.save_pretrained(str(tmp_path / package.__name__))
    ours, theirs = (tokens_in(tmp_path / name) for name in ("graphpeft", "peft"))
    assert torch.equal(ours, theirs)
    assert torch.equal(*returned)
    assert torch.equal(ours, returned[0])


def test_the_model_reads_the_text_in_evaluation_and_without_adapters() -> None:
    expected = graphpeft.prompt_embeddings_from_past_key_values(
        cache_of(GPT2.build(), ids_of(TEXT)), num_virtual_tokens=6
    )
    model: Any = moved(adapted(graphpeft, GPT2))
    model.add_adapter("lora", graphpeft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    found = graphpeft.initialize_kv_prefix_from_text(model, Letters(), text=TEXT, adapter_name="default")
    assert equal(found, expected)
    assert [module.training for module in model.modules()] == modes
    assert model.active_adapters == ["default", "lora"]


def test_prefix_tuning_begins_so_too() -> None:
    config: Any = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 20}
    model: Any = get_peft_model(LLAMA.build(), graphpeft.PrefixTuningConfig(**config))
    graphpeft.initialize_kv_prefix_from_text(model, Letters(), text=TEXT)
    expected = logits(LLAMA.build(), input_ids=torch.cat((ids_of(TEXT), QUESTION), dim=1))[:, -5:]
    assert (logits(model) - expected).abs().max() < 1e-5


def test_a_cache_of_pairs_and_one_of_a_fixed_size_are_caches() -> None:
    base: Any = LLAMA.build()
    cache = cache_of(base, ids_of(TEXT))
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    expected = graphpeft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=6)
    assert torch.equal(graphpeft.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=6), expected)
    assert torch.equal(of_peft.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=6), expected)
    fixed = transformers.StaticCache(config=base.config, max_cache_len=30)
    with torch.no_grad():
        base(input_ids=ids_of(TEXT), past_key_values=fixed, use_cache=True)
    assert equal(graphpeft.prompt_embeddings_from_past_key_values(fixed, num_virtual_tokens=6), expected)
    with pytest.raises(ValueError, match="has 20 tokens, and num_virtual_tokens is 25"):
        graphpeft.prompt_embeddings_from_past_key_values(fixed, num_virtual_tokens=25)


def test_half_precision_values_become_single_ones() -> None:
    model: Any = get_peft_model(LLAMA.build().bfloat16(), CartridgeConfig(**OPTIONS))
    found = graphpeft.initialize_kv_prefix_from_text(model, Letters(), text=TEXT)
    assert found.dtype == torch.bfloat16
    assert torch.equal(model.prompt_encoder["default"].trainable_embedding, found[2:].float())


# refusals


def windowed() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=VOCABULARY, **sizes, **heads)).eval()


def test_a_layer_that_has_thrown_the_first_tokens_away_is_refused() -> None:
    model: Any = get_peft_model(windowed(), CartridgeConfig(**OPTIONS))
    before = laws.snapshot(model)
    with pytest.raises(ValueError, match="layer 0 keeps 7 of 20 tokens, and no longer the first ones"):
        graphpeft.initialize_kv_prefix_from_text(model, Letters(), text=TEXT)
    laws.require_unchanged(model, before, "a refused initialisation")
    graphpeft.initialize_kv_prefix_from_text(model, Letters(), text=TEXT, max_length=6)


@pytest.mark.parametrize(
    ("cache", "error", "words"),
    [
        ([], ValueError, "the cache is empty"),
        (transformers.DynamicCache(), ValueError, "the cache is empty"),
        ("cache", TypeError, "a str doesn't tell the keys of each layer"),
        ([(torch.ones(2, 2, 9, 8),) * 2] * 2, ValueError, "of 2 sequences"),
        ([(torch.ones(1, 2, 9, 8),) * 2, (torch.ones(1, 2, 9, 4),) * 2], ValueError, "of one size in all layers"),
        ([(torch.ones(1, 2, 9),) * 2] * 2, ValueError, "of one size in all layers"),
        ([(torch.ones(1, 2, 5, 8),) * 2] * 2, ValueError, "has 5 tokens, and num_virtual_tokens is 6"),
        ([(torch.ones(1, 2, 9, 8),) * 2] * 3, ValueError, r"shape \(6, 96\), and 'default' has one of \(6, 64\)"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(cache: Any, error: type[Exception], words: str) -> None:
    model = adapted(graphpeft)
    before = laws.snapshot(model)
    with pytest.raises(error, match=words):
        graphpeft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    laws.require_unchanged(model, before, "a refused initialisation")


def test_an_adapter_that_has_no_keys_is_refused() -> None:
    model: Any = get_peft_model(LLAMA.build(), graphpeft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="'default' is a LORA adapter, which has no keys and values"):
        graphpeft.initialize_kv_prefix_from_text(model, Letters(), text=TEXT)
    config: Any = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6, "prefix_projection": True}
    model = get_peft_model(LLAMA.build(), graphpeft.PrefixTuningConfig(**config))
    with pytest.raises(ValueError, match="computes its keys and values by a network"):
        graphpeft.initialize_kv_prefix_from_text(model, Letters(), text=TEXT)
    with pytest.raises(AdaptError, match="other"):
        graphpeft.initialize_kv_prefix_from_text(model, Letters(), text=TEXT, adapter_name="other")


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="num_frozen_tokens=7 is more than num_virtual_tokens=6"):
        CartridgeConfig(**OPTIONS | {"num_frozen_tokens": 7})
    with pytest.raises(ValueError, match="num_frozen_tokens must be a whole number from 0 on"):
        CartridgeConfig(**OPTIONS | {"num_frozen_tokens": -1})
    config = CartridgeConfig(**OPTIONS)
    config.num_frozen_tokens = 9
    with pytest.raises(AdaptError, match="num_frozen_tokens=9 is more"):
        get_peft_model(LLAMA.build(), config)


def test_a_file_of_another_number_of_tokens_is_refused(tmp_path: Path) -> None:
    model = adapted(graphpeft)
    with pytest.raises(ValueError, match=r"has the shape \(5, 64\), and num_virtual_tokens=6"):
        graphpeft.set_peft_model_state_dict(model, {"prompt_embeddings": torch.zeros(5, 64)})
    with pytest.raises(ValueError, match="lacks"):
        graphpeft.set_peft_model_state_dict(model, {})


# several in one


def saved(folder: Path, package: Any = graphpeft, **options: Any) -> str:
    moved(adapted(package, **options), seed=len(str(folder))).save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("safe", [True, False])
def test_a_composed_cartridge_is_pefts(safe: bool, tmp_path: Path) -> None:
    parts = [saved(tmp_path / "a"), saved(tmp_path / "bbb", peft, num_virtual_tokens=4, num_frozen_tokens=1)]
    options: dict[str, Any] = {"safe_serialization": safe}
    graphpeft.compose_cartridge_adapters(parts, output_path=tmp_path / "ours", **options)
    peft.compose_cartridge_adapters(parts, output_path=tmp_path / "theirs", **options)
    theirs: Any = peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "theirs")).eval()
    for package, folder in ((graphpeft, "ours"), (graphpeft, "theirs"), (peft, "ours")):
        model = package.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / folder)).eval()
        assert equal(logits(model), logits(theirs))
    assert CartridgeConfig.from_pretrained(tmp_path / "ours").num_frozen_tokens == 2
    if safe:
        assert torch.equal(tokens_in(tmp_path / "ours"), torch.cat([tokens_in(Path(part)) for part in parts]))


def test_what_can_not_be_composed_is_refused(tmp_path: Path) -> None:
    first, lora = saved(tmp_path / "a"), str(tmp_path / "lora")
    get_peft_model(LLAMA.build(), graphpeft.LoraConfig(target_modules=["q_proj"])).save_pretrained(lora)
    trains_more = saved(tmp_path / "more", modules_to_save=["lm_head"])
    for paths, words in (
        ([first], "nothing to compose"),
        ([first, lora], "holds a LORA adapter, and no cartridge"),
        ([first, trains_more], "lm_head"),
    ):
        with pytest.raises(ValueError, match=words):
            graphpeft.compose_cartridge_adapters(paths, output_path=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    graphpeft.compose_cartridge_adapters([first, first], output_path=tmp_path / "out")
    with pytest.raises(ValueError, match="which readers prefer to a pickle"):
        graphpeft.compose_cartridge_adapters([first, first], output_path=tmp_path / "out", safe_serialization=False)


def test_cartridges_of_other_models_are_not_composed(tmp_path: Path) -> None:
    first = saved(tmp_path / "a")
    gpt2: Any = get_peft_model(GPT2.build(), CartridgeConfig(**OPTIONS))
    gpt2.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="different values of token_dim: 16, 32"):
        graphpeft.compose_cartridge_adapters([first, str(tmp_path / "b")], output_path=tmp_path / "out")
    other = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    shutil.copytree(first, tmp_path / "c")
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps(other | {"base_model_name_or_path": "some/other"}))
    with pytest.warns(UserWarning, match="different base models: None, some/other"):
        graphpeft.compose_cartridge_adapters([first, str(tmp_path / "c")], output_path=tmp_path / "out")
