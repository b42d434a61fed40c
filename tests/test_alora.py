"""Activated LoRA beside PEFT's: where it acts, in calls, in mixed batches, and while a model generates."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
from kinds import ROUNDED
from models import CACHE, LLAMA, T5
from oracle import moved
from safetensors.torch import load_file
from torch import Tensor, nn

import graphpeft
from graphpeft import AdaptError, LoraConfig, PeftModel, get_peft_model, trace

pytestmark = pytest.mark.filterwarnings(
    "ignore:no gradient goes through", "ignore:.*targeted layer of type Linear has no bias", "ignore:.*invalid shape"
)

TOKENS, OTHERS = [5, 7], [6, 6, 3]
OPTIONS: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "alora_invocation_tokens": TOKENS,
}


def prompts() -> Tensor:
    """Returns rows with the tokens twice, at their end, with the beginning of them alone, and with others."""
    ids = torch.randint(8, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 2:4] = ids[0, 5:7] = ids[1, 7:9] = torch.tensor(TOKENS)
    ids[2, 8] = TOKENS[0]
    ids[3, 1:4] = torch.tensor(OTHERS)
    return ids


OFFSETS = [4, 2, None, None]
"""How far before the end the last tokens of each row begin."""


def both(tmp_path: Path, **options: Any) -> tuple[Any, Any]:
    """Returns PEFT's model and ours with the same adapter, which has moved."""
    theirs: Any = moved(peft.get_peft_model(LLAMA.build(), peft.LoraConfig(**OPTIONS | options)))
    theirs.save_pretrained(str(tmp_path))
    return theirs, PeftModel.from_pretrained(LLAMA.build(), tmp_path, is_trainable=True).eval()


def ours(**options: Any) -> Any:
    return moved(get_peft_model(LLAMA.build(), LoraConfig(**OPTIONS | options)))


def logits(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


# calls


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_rslora": True, "init_lora_weights": "pissa"}])
def test_outputs_are_pefts_and_those_before_the_tokens_are_the_bases(options: dict[str, Any], tmp_path: Path):
    theirs, model = both(tmp_path, **options)
    expected, base = logits(theirs, input_ids=prompts()), logits(LLAMA.build(), prompts())
    torch.testing.assert_close(logits(model, prompts()), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        logits(model, input_ids=prompts(), alora_offsets=OFFSETS), expected, atol=1e-5, rtol=1e-4
    )
    if "init_lora_weights" in options:
        return  # the residual acts at all positions, as in PEFT
    found = logits(model, prompts())
    acts = (found - base).abs().amax(-1) > 1e-4
    assert acts.sum(1).tolist() == [4, 2, 0, 0]
    assert torch.equal(found[~acts], base[~acts])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_training_step_has_pefts_gradients(dropout: float, tmp_path: Path):
    gradients = []
    for model in both(tmp_path, lora_dropout=dropout):
        torch.manual_seed(3)
        model.train()(input_ids=prompts(), labels=prompts()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(bool(gradient.any()) for gradient in gradients[1])
    torch.testing.assert_close(*gradients)


def test_equal_seeds_give_pefts_values_and_the_file_says_the_tokens(tmp_path: Path):
    following = []
    for library in (peft, graphpeft):
        base = LLAMA.build()
        torch.manual_seed(7)
        model: Any = library.get_peft_model(base, library.LoraConfig(**OPTIONS))  # type: ignore[attr-defined]
        following.append(torch.rand(2))
        model.save_pretrained(str(tmp_path / library.__name__))
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("graphpeft", "peft")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensor) for key, tensor in tensors[1].items())
    assert torch.equal(*following)
    written = json.loads((tmp_path / "graphpeft" / "adapter_config.json").read_text())
    assert written["alora_invocation_tokens"] == TOKENS
    again = peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "graphpeft")).eval()
    torch.testing.assert_close(logits(again, input_ids=prompts()), logits(model.eval(), prompts()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_base_has_pefts_outputs(dtype: torch.dtype, tmp_path: Path):
    theirs: Any = moved(peft.get_peft_model(LLAMA.build().to(dtype), peft.LoraConfig(**OPTIONS)))
    theirs.save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(LLAMA.build().to(dtype), tmp_path).eval()
    found, expected = logits(model, prompts()), logits(theirs, input_ids=prompts())
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_a_prompt_shorter_than_the_tokens_is_the_bases():
    assert torch.equal(logits(ours(), prompts()[:, :1]), logits(LLAMA.build(), prompts()[:, :1]))


def test_a_call_without_tokens_says_what_it_needs():
    embeds = torch.nn.functional.embedding(prompts(), LLAMA.build().state_dict()["model.embed_tokens.weight"])
    with pytest.raises(TypeError, match="an active adapter needs alora_offsets in each call"):
        ours()(inputs_embeds=embeds)
    torch.testing.assert_close(
        logits(ours(), inputs_embeds=embeds, alora_offsets=torch.tensor([4, 2, 0, 0])), logits(ours(), prompts())
    )


def test_positions_that_no_layer_can_tell_are_refused():
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(6, 8)), LoraConfig(alora_invocation_tokens=[1], target_modules=["0"])
    )
    assert model(torch.ones(2, 5, 6), alora_offsets=[2, 0]).shape == (2, 5, 8)
    with pytest.raises(ValueError, match=r"alora_offsets has 2 rows, and an adapted layer is given .* \(10, 6\)"):
        model(torch.ones(10, 6), alora_offsets=[2, 0])
    with pytest.raises(ValueError, match=r"is given .* \(2, 5, 1, 6\)"):
        model(torch.ones(2, 5, 1, 6), alora_offsets=[2, 0])


# generating


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 1, "do_sample": True}, {"min_new_tokens": 3}, {"cache_implementation": "static"}],
    ids=["greedy", "sampling", "at-least", "static"],
)
def test_it_generates_pefts_tokens(options: dict[str, Any], tmp_path: Path):
    found = []
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "disable_compile": True, **options}
    for model in both(tmp_path):
        torch.manual_seed(1)
        found.append(model.generate(input_ids=prompts(), **given))
    assert torch.equal(*found)
    base: Any = LLAMA.build()
    torch.manual_seed(1)
    assert not torch.equal(base.generate(prompts(), **given), found[1])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("way", [{"use_cache": True}, {"prefill_chunk_size": 4}], ids=["cache", "in-pieces"])
def test_a_cache_changes_no_token(way: dict[str, Any], beams: int):
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    model, searched = ours(), []
    for options in ({"use_cache": False}, way):
        searched.append(model.generate(prompts(), return_dict_in_generate=True, output_scores=True, **given, **options))
    assert torch.equal(searched[0].sequences, searched[1].sequences)
    for one, other in zip(searched[0].scores, searched[1].scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_prompts_of_unequal_length_are_padded_on_the_left():
    model = ours()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids, mask = prompts(), torch.ones(4, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    together = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(together[1, 9:], model.generate(ids[1:2, 4:], **options)[0, 5:])
    assert torch.equal(together[0], model.generate(ids[:1], **options)[0])


def test_the_cache_of_the_base_serves_the_adapter():
    model, ids = ours(), prompts()[:2]
    expected = logits(model, ids)
    with torch.no_grad(), model.disable_adapter():
        cache = model(ids[:, :5], use_cache=True).past_key_values
    found = logits(model, ids[:, 5:], **{CACHE: cache})
    torch.testing.assert_close(found, expected[:, 5:])


def test_a_step_by_hand_is_warned_of_where_the_tokens_came_before():
    model, ids = ours(), prompts()[:1]
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        with pytest.warns(graphpeft.PeftWarning, match="a call with a cache has no alora_invocation_tokens"):
            model(ids[:, 8:], **{CACHE: cache})
        found = model(ids[:, 8:], **{CACHE: again}, alora_offsets=[4]).logits
    torch.testing.assert_close(found, logits(model, ids)[:, 8:])


# several adapters


def test_adapters_of_other_tokens_act_where_their_own_are():
    model: Any = get_peft_model(LLAMA.build(), LoraConfig(**OPTIONS))
    model.add_adapter("other", LoraConfig(**OPTIONS | {"alora_invocation_tokens": OTHERS, "r": 2}))
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(moved(model), prompts())
    model.set_adapter(["default", "other"])
    # no row has the tokens of both
    rows = torch.stack([alone["default"][0], alone["default"][1], alone["default"][2], alone["other"][3]])
    torch.testing.assert_close(logits(model, prompts()), rows)
    model.delete_adapter("default")
    assert torch.equal(logits(model, prompts()), alone["other"])
    assert torch.equal(logits(model.unload(), prompts()), logits(LLAMA.build(), prompts()))


def mixture(library: Any) -> Any:
    """Returns a model with aLoRA, plain LoRA and aLoRA of other tokens."""
    model: Any = library.get_peft_model(LLAMA.build(), library.LoraConfig(**OPTIONS), "alora")
    model.add_adapter("plain", library.LoraConfig(**OPTIONS | {"alora_invocation_tokens": None}))
    model.add_adapter("other", library.LoraConfig(**OPTIONS | {"alora_invocation_tokens": OTHERS}))
    for seed, name in enumerate(("alora", "plain", "other")):
        model.set_adapter(name)
        moved(model, seed)
    model.set_adapter("alora")
    return model


NAMES = ["plain", "alora", "__base__", "other"]


def test_rows_of_a_batch_have_pefts_adapters_and_offsets():
    theirs, model = mixture(peft), mixture(graphpeft)
    expected = logits(theirs, input_ids=prompts(), adapter_names=NAMES)
    found = logits(model, prompts(), adapter_names=NAMES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, logits(model, prompts(), adapter_names=["alora"] * 4), atol=1e-3)
    with model.mixed_batch(NAMES):
        assert torch.equal(logits(model, prompts()), found)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "adapter_names": NAMES}
    generated = model.generate(prompts(), **options)
    assert torch.equal(generated, theirs.generate(input_ids=prompts(), **options))
    beams = [model.generate(prompts(), num_beams=3, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*beams)


def test_it_is_not_merged_and_not_combined():
    model = ours()
    before = logits(model, prompts())
    with pytest.raises(AdaptError, match="aLoRA acts at some positions of a row alone"):
        model.merge_adapter()
    with pytest.raises(AdaptError, match="aLoRA is more than a product of A and B"):
        model.add_weighted_adapter(["default"], [0.5], "half", combination_type="linear")
    assert torch.equal(logits(model, prompts()), before)


# refusals


@pytest.mark.parametrize(
    "option", [{"use_dora": True}, {"init_lora_weights": "mica"}, {"ensure_weight_tying": True}], ids=str
)
def test_options_of_other_changes_are_refused(option: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"alora_invocation_tokens=\[5, 7\] can't go with {next(iter(option))}="):
        LoraConfig(**OPTIONS | option)


def test_layers_that_are_not_linear_are_refused():
    for layer in (nn.Embedding(6, 8), nn.Conv1d(6, 8, 1), nn.MultiheadAttention(8, 2)):
        with pytest.raises(AdaptError, match="aLoRA is for linear layers, as in PEFT"):
            get_peft_model(nn.Sequential(layer), LoraConfig(alora_invocation_tokens=[1], target_modules=["0"]))


def test_a_model_that_encodes_its_prompt_apart_says_what_it_needs():
    model: Any = get_peft_model(T5.build(), LoraConfig(alora_invocation_tokens=TOKENS, target_modules=["q"]))
    with pytest.raises(TypeError, match="an active adapter needs alora_offsets"):
        model.generate(prompts(), max_new_tokens=2)


# the laws, compiled, checkpointed, traced, exported


def test_a_trace_computes_the_same():
    model: Any = trace(LLAMA.build(), {"input_ids": prompts(), "use_cache": False})
    get_peft_model(model, LoraConfig(**OPTIONS))
    torch.testing.assert_close(logits(moved(model), input_ids=prompts(), use_cache=False), logits(ours(), prompts()))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiled)])
def test_compiled_it_computes_and_trains_the_same(backend: str):
    model = ours()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(logits(compiled, prompts()), logits(model, prompts()), atol=1e-5, rtol=1e-4)
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    gradients = [
        torch.autograd.grad(run(input_ids=prompts()).logits.square().mean(), trained) for run in (model, compiled)
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_it_trains_the_same(use_reentrant: bool):
    gradients = []
    for is_checkpointed in (False, True):
        model = ours().train()
        if is_checkpointed:
            named = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            named({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=prompts()).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


class Tokens(nn.Module):
    """A layer behind a table, which an export can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 6), nn.Linear(6, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(self.table(input_ids))


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_exported_it_looks_for_the_tokens(suffix: str, tmp_path: Path):
    torch.manual_seed(0)
    config = LoraConfig(alora_invocation_tokens=TOKENS, target_modules=["layer"], r=2)
    model: Any = moved(get_peft_model(Tokens(), config))
    graphpeft.export(model, {"input_ids": prompts()}, tmp_path / f"m.{suffix}", format=suffix, adapters="baked")
    ids = prompts().flip(0)
    if suffix == "pt2":
        found = torch.export.load(tmp_path / "m.pt2").module()(input_ids=ids)
    else:
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])
    torch.testing.assert_close(found, model(ids), atol=1e-5, rtol=1e-4)


def test_copies_stay_adapted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ours()
        assert torch.equal(logits(copy.deepcopy(model), prompts()), logits(model, prompts()))


def test_the_call_of_a_quantised_layer_has_it_too():
    case, found = ROUNDED, []
    (x,) = case.inputs()
    for tokens in (TOKENS, None):
        options: dict[str, Any] = {"r": 2, "alora_invocation_tokens": tokens, **case.targets}
        model: Any = moved(get_peft_model(case.build(), LoraConfig(**options)))
        given: dict[str, Any] = {} if tokens is None else {"alora_offsets": [1] * len(x)}
        found.append(model(x, **given))
    if x.ndim == 3:
        base = case.build()(x)
        assert torch.equal(found[0][:, :-1], base[:, :-1])
        assert not torch.allclose(found[0][:, -1], base[:, -1])
    torch.testing.assert_close(found[0][:, -1], found[1][:, -1])
