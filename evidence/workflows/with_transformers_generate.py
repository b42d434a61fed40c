"""Transformers' generate and pipelines with an adapted model."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from trainer_runs import adapted
from workflow import Values, workflow

TOOL = "transformers: generate"
PROMPT = ["abc", "some words"]


def _model(peft: Any, **options: Any) -> Any:
    """Returns a model with an adapter that changes the generated tokens."""
    model = adapted(peft, **options)
    for name, each in model.named_parameters():
        if "lora_" in name:
            each.data *= 4
    return model.eval()


def _given(texts: list[str] = PROMPT) -> Any:
    return tiny.tokenizer()(texts, padding=True, return_tensors="pt", return_token_type_ids=False)


@workflow(TOOL, "greedy, with padding on the left; the adapter changes the text")
def greedy(peft: Any, _: Path) -> Values:
    model = _model(peft)
    tokens = model.generate(**_given(), max_new_tokens=8, do_sample=False)
    with model.disable_adapter():
        base = model.generate(**_given(), max_new_tokens=8, do_sample=False)
    assert not torch.equal(tokens, base)
    return {"tokens": tokens.tolist(), "base": base.tolist()}


@workflow(TOOL, "sampled: temperature, top-k, top-p, several texts for each prompt")
def sampled(peft: Any, _: Path) -> Values:
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "num_return_sequences": 2}
    torch.manual_seed(3)
    return {"tokens": _model(peft).generate(**_given(), max_new_tokens=6, **options).tolist()}


@workflow(TOOL, "beams, with scores and a penalty of length")
def beams(peft: Any, _: Path) -> Values:
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "return_dict_in_generate": True}
    found = _model(peft).generate(**_given(), max_new_tokens=6, output_scores=True, **options)
    return {"tokens": found.sequences.tolist(), "scores": found.sequences_scores.tolist()}


@workflow(TOOL, "a static cache")
def static(peft: Any, _: Path) -> Values:
    options = {"cache_implementation": "static", "disable_compile": True}
    return {"tokens": _model(peft).generate(**_given(), max_new_tokens=6, do_sample=False, **options).tolist()}


@workflow(TOOL, "without a cache")
def uncached(peft: Any, _: Path) -> Values:
    return {"tokens": _model(peft).generate(**_given(), max_new_tokens=6, do_sample=False, use_cache=False).tolist()}


@workflow(TOOL, "assisted by another model")
def assisted(peft: Any, _: Path) -> Values:
    model, given = _model(peft), _given(["abc"])
    tokens = model.generate(**given, max_new_tokens=6, do_sample=False, assistant_model=tiny.llama())
    assert torch.equal(tokens, model.generate(**given, max_new_tokens=6, do_sample=False))
    return {"tokens": tokens.tolist()}


@workflow(TOOL, "the adapted model assists its base")
def assisting(peft: Any, _: Path) -> Values:
    given = _given(["abc"])
    tokens = tiny.llama().generate(**given, max_new_tokens=6, do_sample=False, assistant_model=_model(peft))
    return {"tokens": tokens.tolist()}


@workflow(TOOL, "guesses looked up in the prompt")
def lookup(peft: Any, _: Path) -> Values:
    given = _given(["ababab"])
    tokens = _model(peft).generate(**given, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
    return {"tokens": tokens.tolist()}


@workflow(TOOL, "streamed, in a thread of its own")
def streamed(peft: Any, _: Path) -> Values:
    streamer = transformers.TextIteratorStreamer(tiny.tokenizer(), skip_prompt=True, timeout=30)
    model = _model(peft)
    options = {**_given(["abc"]), "max_new_tokens": 6, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    return {"pieces": pieces}


@workflow(TOOL, "processors of logits, words that are forbidden, a criterion to stop")
def processed(peft: Any, _: Path) -> Values:
    class Higher(transformers.LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            scores[:, 7] += 0.1
            return scores

    class At12(transformers.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    options = {"logits_processor": transformers.LogitsProcessorList([Higher()]), "bad_words_ids": [[5], [9, 10]]}
    options |= {"stopping_criteria": transformers.StoppingCriteriaList([At12()]), "repetition_penalty": 1.2}
    return {"tokens": _model(peft).generate(**_given(), max_new_tokens=20, do_sample=False, **options).tolist()}


@workflow(TOOL, "a cache of the prompt, continued by hand and reused")
def by_hand(peft: Any, _: Path) -> Values:
    model, given = _model(peft), _given(["abc def"])
    with torch.no_grad():
        first = model(**given, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        second = model(input_ids=token, past_key_values=copy.deepcopy(first.past_key_values), use_cache=True)
        whole = model(input_ids=torch.cat((given["input_ids"], token), 1))
    torch.testing.assert_close(second.logits[:, -1], whole.logits[:, -1])
    return {"logits": second.logits.sum().item()}


@workflow(TOOL, "adapters for each row of a batch, with beams")
def rows(peft: Any, _: Path) -> Values:
    model = _model(peft)
    torch.manual_seed(4)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    given = _given(["abc", "abc", "abc"])
    names = ["default", "second", "__base__"]
    greedy = model.generate(**given, max_new_tokens=5, do_sample=False, adapter_names=names)
    beams = model.generate(**given, max_new_tokens=5, num_beams=2, do_sample=False, adapter_names=names)
    return {"greedy": greedy.tolist(), "beams": beams.tolist()}


@workflow(TOOL, "P-tuning: the first token")
def p_tuning(peft: Any, _: Path) -> Values:
    torch.manual_seed(1)
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)
    model = peft.get_peft_model(tiny.llama(), config).eval()
    return {"tokens": model.generate(**_given(["abc"]), max_new_tokens=1, do_sample=False).tolist()}


@workflow(TOOL, "an encoder-decoder, with beams")
def pair(peft: Any, _: Path) -> Values:
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.t5(), config).eval()
    return {"tokens": model.generate(**_given(), max_new_tokens=6, num_beams=2, do_sample=False).tolist()}


@workflow(TOOL, "images and text (Llava)")
def llava(peft: Any, _: Path) -> Values:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*proj", init_lora_weights=False)
    model = peft.get_peft_model(tiny.llava(), config).eval()
    tokens = torch.tensor([[*[29] * 4, 5, 6]])
    picture = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return {
        "tokens": model.generate(input_ids=tokens, pixel_values=picture, max_new_tokens=4, do_sample=False).tolist()
    }


@workflow(TOOL, "experts, whose stacked weights are adapted")
def experts(peft: Any, _: Path) -> Values:
    model = adapted(peft, tiny.mixtral(), target_modules=[], target_parameters=["experts.down_proj"]).eval()
    return {"tokens": model.generate(**_given(), max_new_tokens=5, do_sample=False).tolist()}


@workflow(TOOL, "compiled, with a static cache")
def compiled(peft: Any, _: Path) -> Values:
    model = _model(peft)
    model.forward = torch.compile(model.forward, backend="eager")
    options = {"cache_implementation": "static", "max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    return {"tokens": model.generate(**_given(["abc"]), **options).tolist()}


@workflow(TOOL, "pipeline for text, with the adapter's folder named")
def pipeline(peft: Any, folder: Path) -> Values:
    tiny.llama().save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted(peft, base).save_pretrained(folder / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    write = transformers.pipeline("text-generation", model=loaded, tokenizer=tiny.tokenizer(), device="cpu")
    named = transformers.pipeline(
        "text-generation", model=str(folder / "adapter"), tokenizer=tiny.tokenizer(), device="cpu"
    )
    texts = [each("abc", max_new_tokens=5, do_sample=False)[0]["generated_text"] for each in (write, named)]
    assert texts[0] == texts[1]
    return {"texts": texts}


@workflow(TOOL, "pipeline that classifies texts")
def classified(peft: Any, _: Path) -> Values:
    base = tiny.llama(transformers.LlamaForSequenceClassification, num_labels=2)
    model = adapted(peft, base, task_type="SEQ_CLS").eval()
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tiny.tokenizer(), device="cpu")
    return {"found": classify(["abc", "def ghi"])}
