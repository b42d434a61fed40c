"""PEFT's own API: prompts and prefixes, trained, saved, switched and generated with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from workflow import Values, workflow

TOOL = "PEFT: prompts"
TOKENS = torch.arange(3, 12).view(1, 9)
GIVEN = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}


def _trained(peft: Any, config: Any, folder: Path, base: Any = tiny.llama, **more: Any) -> Values:
    """Returns the losses of a few steps, and the loss with the loaded prompt."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), config)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.1)
    found = []
    for _ in range(3):
        loss = model(**GIVEN, labels=TOKENS, **more).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    model.eval().save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base(), folder)
    with torch.no_grad():
        after = [each(**GIVEN, labels=TOKENS, **more).loss.item() for each in (model, loaded)]
    assert abs(after[0] - after[1]) < 1e-4
    assert "prompt_embeddings" in peft.load_peft_weights(str(folder))
    return {"losses": found, "loaded": after[1]}


@workflow(TOOL, "prompt tuning")
def prompt_tuning(peft: Any, folder: Path) -> Values:
    return _trained(peft, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), folder)


@workflow(TOOL, "prompt tuning that begins as tokens drawn from the vocabulary")
def sampled(peft: Any, folder: Path) -> Values:
    options = {"num_virtual_tokens": 4, "prompt_tuning_init": "SAMPLE_VOCAB"}
    return _trained(peft, peft.PromptTuningConfig(task_type="CAUSAL_LM", **options), folder)


@workflow(TOOL, "P-tuning by a perceptron")
def p_tuning(peft: Any, folder: Path) -> Values:
    options = {"num_virtual_tokens": 4, "encoder_hidden_size": 8}
    return _trained(peft, peft.PromptEncoderConfig(task_type="CAUSAL_LM", **options), folder)


@workflow(TOOL, "P-tuning by an LSTM")
def p_tuning_lstm(peft: Any, folder: Path) -> Values:
    options = {"num_virtual_tokens": 4, "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}
    options |= {"encoder_num_layers": 1, "encoder_dropout": 0.0}
    return _trained(peft, peft.PromptEncoderConfig(task_type="CAUSAL_LM", **options), folder)


@workflow(TOOL, "prefix tuning")
def prefix(peft: Any, folder: Path) -> Values:
    return _trained(peft, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), folder)


@workflow(TOOL, "prefix tuning by a perceptron (prefix_projection)")
def prefix_projection(peft: Any, folder: Path) -> Values:
    options = {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8}
    return _trained(peft, peft.PrefixTuningConfig(task_type="CAUSAL_LM", **options), folder)


@workflow(TOOL, "multitask prompt tuning, then another task from it")
def multitask(peft: Any, folder: Path) -> Values:
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    config = peft.MultitaskPromptTuningConfig(num_tasks=2, **options)
    found = {"source": _trained(peft, config, folder / "source", task_ids=torch.tensor([1]))}
    saved = str(folder / "source" / "adapter_model.safetensors")
    config = peft.MultitaskPromptTuningConfig(
        num_tasks=1,
        prompt_tuning_init="ONLY_SOURCE_SHARED",
        prompt_tuning_init_state_dict_path=saved,
        **options,
    )
    return found | {"target": _trained(peft, config, folder / "target", task_ids=torch.tensor([0]))}


@workflow(TOOL, "CPT: a context of examples")
def cpt(peft: Any, folder: Path) -> Values:
    ids = list(range(5, 11))
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=ids,
        cpt_mask=[1] * len(ids),
        cpt_tokens_type_mask=[1, 2, 3, 4, 1, 2],
        opt_weighted_loss_type="decay",
    )
    return _trained(peft, config, folder, input_type_mask=torch.ones_like(TOKENS))


@workflow(TOOL, "prompt tuning of an encoder-decoder")
def pair(peft: Any, folder: Path) -> Values:
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    return _trained(peft, config, folder, base=tiny.t5)


@workflow(TOOL, "prefix tuning of an encoder-decoder")
def prefix_pair(peft: Any, folder: Path) -> Values:
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    return _trained(peft, config, folder, base=tiny.t5)


@workflow(TOOL, "P-tuning that classifies sequences, with a trained head")
def sequences(peft: Any, folder: Path) -> Values:
    def base() -> Any:
        torch.manual_seed(0)
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.BertForSequenceClassification(transformers.BertConfig(**size, vocab_size=30, num_labels=2))

    torch.manual_seed(1)
    config = peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=4, encoder_hidden_size=8)
    model = peft.get_peft_model(base(), config).eval()
    model(**GIVEN, labels=torch.tensor([1])).loss.backward()
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base(), folder)
    heads = [key for key in peft.load_peft_weights(str(folder)) if "classifier" in key]
    gradients = sum(each.grad.norm().item() for each in model.parameters() if each.grad is not None)
    return {"logits": loaded(**GIVEN).logits.flatten().tolist(), "heads": sorted(heads), "gradients": gradients}


@workflow(TOOL, "two prompts on a model, switched")
def switched(peft: Any, _: Path) -> Values:
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny.llama(), config, "first")
    model.add_adapter("second", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    found = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        found[name] = model.eval()(**GIVEN).logits.square().sum().item()
    with model.disable_adapter():
        found["base"] = model(**GIVEN).logits.square().sum().item()
    return found


@workflow(TOOL, "generated tokens are those that the forward gives, one after the other")
def generated(peft: Any, _: Path) -> Values:
    torch.manual_seed(1)
    model = peft.get_peft_model(
        tiny.llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "prompt" in name:
                each.mul_(30)
    tokens = TOKENS
    with torch.no_grad():
        for _step in range(5):
            tokens = torch.cat((tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)), 1)
    written = model.generate(input_ids=TOKENS, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, tokens), "generate() writes other tokens than the forward gives"
    return {"tokens": tokens.tolist()}
