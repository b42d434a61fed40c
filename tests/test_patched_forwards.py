"""Adapters act in forwards that other code sets on an adapted model, as trl does, or an error says that they can't."""

from __future__ import annotations

import copy
import types
import warnings
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

import graphpeft

TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
GIVEN: dict[str, Any] = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}
PROMPTS: dict[str, dict[str, Any]] = {
    "PromptTuningConfig": {},
    "PromptEncoderConfig": {"encoder_hidden_size": 8},
    "PrefixTuningConfig": {"prefix_projection": True, "encoder_hidden_size": 8},
}
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def base() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.LlamaConfig(vocab_size=20, **sizes, pad_token_id=0, eos_token_id=1)
    return transformers.LlamaForCausalLM(config).eval()


def prompted(library: Any, name: str) -> Any:
    model = base()
    torch.manual_seed(1)
    config = getattr(library, name)(task_type="CAUSAL_LM", num_virtual_tokens=3, **PROMPTS[name])
    return library.get_peft_model(model, config).eval()


def with_losses(model: Any) -> Any:
    """Sets a forward that computes losses as trl's does: by the layers below the head, and the head's weight."""
    inner = model.get_base_model()
    replaced = inner.forward

    def forward(self: Any, *args: Any, fused: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused:
            return replaced(*args, labels=labels, **kwargs)
        hidden = self.model(*args, **kwargs).last_hidden_state[:, :-1]
        logits = hidden @ self.get_output_embeddings().weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    inner.forward = types.MethodType(forward, inner)
    return model


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_goes_into_a_forward_that_leaves_out_the_one_it_replaced(name: str) -> None:
    ours, theirs = (with_losses(prompted(library, name)) for library in (graphpeft, peft))
    loss = ours(**GIVEN, fused=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")  # PEFT's name of the cache
        expected = theirs(**GIVEN, fused=True)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    found = [each.grad for each in ours.parameters() if each.requires_grad]
    assert found
    for gradient, of_theirs in zip(
        found, (each.grad for each in theirs.parameters() if each.requires_grad), strict=True
    ):
        torch.testing.assert_close(gradient, of_theirs)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_goes_into_a_forward_that_was_set_before_adapting(name: str) -> None:
    outputs = []
    for library in (graphpeft, peft):
        model = base()
        replaced = model.forward
        model.forward = lambda *args, replaced=replaced, **kwargs: replaced(*args, **kwargs).logits * 0.7
        known, expected = model.forward, model(**GIVEN)
        torch.manual_seed(1)
        config = getattr(library, name)(task_type="CAUSAL_LM", num_virtual_tokens=3, **PROMPTS[name])
        adapted = library.get_peft_model(model, config).eval()
        outputs.append(adapted(input_ids=TOKENS))
        if library is graphpeft:
            with adapted.disable_adapter():
                assert torch.equal(adapted(**GIVEN), expected)
            unloaded = adapted.unload()
            assert unloaded.forward is known
            assert torch.equal(unloaded(**GIVEN), expected)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_goes_in_once_where_the_replaced_forward_is_called(name: str) -> None:
    model = prompted(graphpeft, name)
    expected, tokens = model(**GIVEN), model.generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False)
    with_losses(model)
    found = model(**GIVEN)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)
    assert torch.equal(model.generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False), tokens)


def test_hooks_of_the_model_run_once() -> None:
    model = with_losses(prompted(graphpeft, "PromptTuningConfig"))
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(lambda *_: calls.append("after"))
    model(**GIVEN, fused=True)
    assert calls == ["before", "after"]


@pytest.mark.parametrize("name", PROMPTS)
def test_without_its_prompt_a_model_runs_what_was_set_alone(name: str) -> None:
    expected = with_losses(graphpeft.get_peft_model(base(), graphpeft.LoraConfig(r=2, target_modules=["q_proj"])))
    model = with_losses(prompted(graphpeft, name))
    prompt = model(**GIVEN, fused=True)
    with model.disable_adapter():
        torch.testing.assert_close(model(**GIVEN, fused=True), expected(**GIVEN, fused=True))
    torch.testing.assert_close(model(**GIVEN, fused=True), prompt)
    model.unload()
    torch.testing.assert_close(model(**GIVEN, fused=True), expected(**GIVEN, fused=True))
    torch.testing.assert_close(model(**GIVEN).logits, expected(**GIVEN).logits)


def test_a_prompt_goes_into_a_forward_that_was_set_and_compiled() -> None:
    model = with_losses(prompted(graphpeft, "PromptTuningConfig"))
    expected = model(**GIVEN, fused=True)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**GIVEN, fused=True), expected)


def test_lora_acts_in_a_forward_that_was_set_and_is_merged_and_unloaded_under_it() -> None:
    config: dict[str, Any] = {**LORA, "target_modules": ["q_proj", "down_proj"]}
    torch.manual_seed(1)
    model = with_losses(graphpeft.get_peft_model(base(), graphpeft.LoraConfig(**config)))
    expected, logits = model(**GIVEN, fused=True), model(**GIVEN).logits
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(**GIVEN, fused=True), expected)
    torch.testing.assert_close(plain(**GIVEN).logits, logits)


def test_an_adapter_of_the_head_acts_where_the_weight_of_the_head_is_read() -> None:
    options = {**LORA, "init_lora_weights": False}
    model = with_losses(graphpeft.get_peft_model(base(), graphpeft.LoraConfig(**options, target_modules=["lm_head"])))
    found = model(**GIVEN, fused=True)
    found.backward()
    assert model.lm_head.default.lora_A.grad.abs().max() > 0
    with model.disable_adapter():
        assert not torch.allclose(model(**GIVEN, fused=True), found)
    model.merge_adapter()
    torch.testing.assert_close(model(**GIVEN, fused=True), found)


def test_a_head_that_is_fully_trained_is_read_by_its_weight() -> None:
    options: dict[str, Any] = {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = with_losses(graphpeft.get_peft_model(base(), graphpeft.LoraConfig(**options)))
    model(**GIVEN, fused=True).backward()
    (head,) = (each for name, each in model.named_parameters() if "lm_head" in name and each.requires_grad)
    assert head.grad is not None


def test_a_copy_runs_what_was_set_on_its_original() -> None:
    model = with_losses(prompted(graphpeft, "PromptTuningConfig"))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(**GIVEN, fused=True), model(**GIVEN, fused=True))
