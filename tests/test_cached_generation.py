"""Exported models generate with a cache, whose tensors have the names that other stacks read."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from exports import LLAMA
from safetensors.torch import load_file
from torch import Tensor, nn

import graphpeft
from graphpeft import ExportError, LoraConfig, generation_inputs

TOKENS = 10
IDS = torch.tensor([[3, 9, 4, 11, 5], [8, 2, 7, 6, 12], [5, 5, 30, 1, 17]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])


def generated(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns the tokens that a model generates with its own cache, and the logits by which it chose them."""
    model.generation_config.eos_token_id = None
    found = model.generate(
        input_ids=IDS,
        attention_mask=MASK,
        max_new_tokens=TOKENS,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return found.sequences[:, IDS.shape[1] :], torch.stack(found.logits, 1)


def by_onnxruntime(path: Path, adapter: Path | None = None, **more: Any) -> Any:
    """Returns a function that runs a file with an adapter, by the names that optimum and ONNX Runtime GenAI use."""
    settings, options = onnxruntime.SessionOptions(), onnxruntime.RunOptions()
    settings.log_severity_level = 3
    session, loaded = onnxruntime.InferenceSession(path, settings), onnxruntime.LoraAdapter()
    if adapter is not None:
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    names = [one.name for one in session.get_outputs()]
    wanted = {one.name: one.shape for one in session.get_inputs()}

    def run(given: dict[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in (given | more).items() if name in wanted}
        alive = loaded  # the options only point to it
        assert arrays.keys() == wanted.keys(), alive
        found = session.run(names, arrays, options)
        return {name: torch.from_numpy(one) for name, one in zip(names, found, strict=True)}

    return run, wanted


def generate_by(run: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Generates as these stacks do: `present.N.key` of one call is `past_key_values.N.key` of the next one."""
    ids, mask = IDS, MASK
    past = {name: torch.zeros(len(IDS), shape[1], 0, shape[3]) for name, shape in shapes.items() if "past" in name}
    tokens, logits = [], []
    for _ in range(TOKENS):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        found = run({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
        logits.append(found["logits"][:, -1])
        ids = logits[-1].argmax(-1, keepdim=True)
        tokens.append(ids)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    return torch.cat(tokens, 1), torch.stack(logits, 1)


def assert_generates(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


def assert_file_generates(path: Path, model: Any, adapter: Path | None = None) -> None:
    run, shapes = by_onnxruntime(path, adapter)
    assert_generates(generate_by(run, shapes), generated(model))


@pytest.mark.every
@pytest.mark.parametrize("way", ["merged", "baked"])
def test_a_file_generates_the_tokens_that_the_model_generates_with_its_cache(way, tmp_path):
    model = LLAMA.adapted()
    graphpeft.export(model, generation_inputs(model, IDS, MASK), tmp_path / "m.onnx", "onnx", way, check=False)
    assert_file_generates(tmp_path / "m.onnx", model)


def test_one_file_generates_with_each_adapter(tmp_path):
    model = LLAMA.adapted()
    report = graphpeft.export(model, generation_inputs(model, IDS), tmp_path / "m.onnx", "onnx", "inputs", check=False)
    tokens = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        tokens[name] = generated(model)[0]
        assert_file_generates(tmp_path / "m.onnx", model, report.adapter_files[name])
    assert not torch.equal(tokens["first"], tokens["second"])


def test_each_row_generates_with_its_own_adapter(tmp_path):
    model = LLAMA.adapted()
    graphpeft.export(model, generation_inputs(model, IDS), tmp_path / "m.onnx", "onnx", "rows", check=False)
    run, shapes = by_onnxruntime(tmp_path / "m.onnx", adapter_rows=torch.tensor([1, 0, 1]))
    assert_generates(generate_by(run, shapes), generated(model, adapter_names=["second", "first", "second"]))


def test_a_program_generates_from_prompts_of_any_length(tmp_path):
    model = LLAMA.adapted()
    graphpeft.export(model, generation_inputs(model, IDS), tmp_path / "m.pt2", adapters="inputs", check=False)
    program, adapter = torch.export.load(tmp_path / "m.pt2").module(), load_file(tmp_path / "m.first.safetensors")

    def run(given: dict[str, Tensor]) -> dict[str, Tensor]:
        past = [{kind: given[f"past_key_values.{layer}.{kind}"] for kind in ("key", "value")} for layer in range(2)]
        own = {name: value for name, value in given.items() if "past" not in name}
        found = program(**own, past_key_values=past, adapters=adapter)
        layers = enumerate(found["present"])
        present = {f"present.{n}.{kind}": tensor for n, layer in layers for kind, tensor in layer.items()}
        return {"logits": found["logits"], **present}

    shapes = {f"past_key_values.{layer}.{kind}": (0, 2, 0, 8) for layer in range(2) for kind in ("key", "value")}
    assert_generates(generate_by(run, shapes), generated(model))
    for new, past in ((1, 0), (2, 0), (1, 1)):
        empty = {name: torch.zeros(1, 2, past, 8) for name in shapes}
        positions = torch.arange(new)[None] + past
        mask = torch.ones(1, past + new, dtype=torch.long)
        found = run({"input_ids": IDS[:1, :new], "attention_mask": mask, "position_ids": positions, **empty})
        assert found["logits"].shape[:2] == (1, new)
        assert found["present.1.value"].shape == (1, 2, past + new, 8)


def test_the_tensors_have_the_names_and_sizes_that_other_stacks_read(tmp_path):
    model = LLAMA.adapted()
    report = graphpeft.export(model, generation_inputs(model, IDS), tmp_path / "m.onnx", "onnx", check=False)
    past = {f"past_key_values.{layer}.{kind}": "(a, 2, c, 8)" for layer in range(2) for kind in ("key", "value")}
    assert report.inputs == {"input_ids": "(a, b)", "attention_mask": "(a, b + c)", "position_ids": "(a, b)", **past}
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    present = [name.replace("past_key_values", "present") for name in past]
    assert [one.name for one in session.get_outputs()] == ["logits", *present]


def mistral() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=4, **sizes, **heads))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2))


def bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2))


def gemma() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(sliding_window=4, **sizes, **heads))


@pytest.mark.parametrize("make", [mistral, gpt2, bloom, gemma], ids=lambda make: make.__name__)
def test_other_architectures_generate_alike(make, tmp_path):
    torch.manual_seed(0)
    model: Any = graphpeft.get_peft_model(make(), LoraConfig(r=2, init_lora_weights=False)).eval()
    graphpeft.export(model, generation_inputs(model, IDS), tmp_path / "m.onnx", "onnx", "baked", check=False)
    assert_file_generates(tmp_path / "m.onnx", model)


def test_a_check_lets_the_file_and_the_model_generate(tmp_path):
    model = LLAMA.adapted()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    report = graphpeft.export(model, generation_inputs(model, IDS), tmp_path / "m.pt2")
    assert report.checked[-1].case == "the model, 10 tokens"
    assert report.checked[-1].difference < 1e-4
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def refused(model: Any, example: Any, path: Path, match: str) -> None:
    with pytest.raises(ExportError, match=match):
        graphpeft.export(model, example, path)
    assert not path.exists()


class FirstCallApart(nn.Module):
    """Adds to the logits of first calls, whose cache is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LLAMA.base()

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values: Any = None, use_cache=None):
        bias = 1 if past_key_values.get_seq_length() == 0 else 0
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        given = {"attention_mask": attention_mask, "position_ids": position_ids, name: past_key_values}
        found = self.model(input_ids, **given, use_cache=use_cache)
        return {"logits": found.logits + bias, "past_key_values": past_key_values}


def test_a_model_whose_first_call_computes_something_else_is_refused(tmp_path):
    model = FirstCallApart().eval()
    match = r"differs by .* on inputs of the shapes \[\(3, 5\), .*\(3, 2, 0, 8\)"
    refused(model, generation_inputs(model, IDS), tmp_path / "m.pt2", match)


@pytest.mark.parametrize("make", [graphpeft.PromptTuningConfig, graphpeft.PrefixTuningConfig])
def test_prompts_that_only_first_calls_have_are_refused(make):
    model: Any = graphpeft.get_peft_model(LLAMA.base(), make(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    with pytest.raises(ExportError, match="first call with 5 tokens puts 7 positions into the cache"):
        generation_inputs(model, IDS)


def test_a_cache_that_cant_be_tensors_is_refused_with_the_reason(tmp_path):
    model = LLAMA.adapted()
    for cache, match in (
        (transformers.DynamicCache(), r"the cache is empty, .*generation_inputs has made"),
        (transformers.DynamicCache(config=mistral().config), r"of DynamicSlidingWindowLayer.*as generation_inputs"),
        (transformers.StaticCache(config=model.config, max_cache_len=20), r"is a StaticCache of StaticLayer, .*False"),
    ):
        refused(model, {"input_ids": IDS, "past_key_values": cache}, tmp_path / "m.pt2", match)
    inputs = generation_inputs(model, IDS)
    refused(model, {**inputs, "labels": IDS}, tmp_path / "m.pt2", r"example_inputs has .*labels")


def test_inputs_of_generation_are_made_for_models_that_take_and_return_a_cache():
    class NoCache(nn.Module):
        def forward(self, input_ids):
            return {"logits": input_ids}

    with pytest.raises(ExportError, match="NoCache takes no cache or past_key_values"):
        generation_inputs(NoCache(), IDS)
    with pytest.raises(ExportError, match=r"returns .* without logits and a cache"):
        generation_inputs(LLAMA.base().model, IDS)
    padded = generation_inputs(LLAMA.base(), IDS, MASK)
    assert padded["attention_mask"].tolist()[1] == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert padded["position_ids"].tolist()[1] == [3, 4, 5, 6, 7]
