"""Prefix tuning of models whose layers share keys, or have keys of several sizes, as Gemma 4 does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from graphpeft import AdaptError, PeftModel, PrefixTuningConfig, get_peft_model
from graphpeft.testing import laws

pytestmark = [
    pytest.mark.quick("methods"),
    pytest.mark.skipif(not hasattr(transformers, "Gemma4ForCausalLM"), reason="this Transformers has no Gemma 4"),
    # both libraries pass the cache by its older name, and PEFT asks for what was renamed
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers"),
]

OPTIONS: Any = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}

MODELS: dict[str, dict[str, Any]] = {
    "layers that share keys": {"global_head_dim": 8},
    "no layers that share keys": {"global_head_dim": 8, "num_kv_shared_layers": 0},
    "larger heads in layers of full attention": {"global_head_dim": 16},
}

FEWER_HEADS: dict[str, Any] = {"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True}


def _model(options: dict[str, Any]) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "eos_token_id": None,
        "vocab_size_per_layer_input": 50,
        "hidden_size": 32,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_kv_shared_layers": 2,
        "sliding_window": 16,
        "max_position_embeddings": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    }
    config = transformers.Gemma4TextConfig(**{**sizes, **options})
    torch.manual_seed(1)
    return transformers.Gemma4ForCausalLM(config).eval()


def _inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_outputs_and_generated_tokens_are_pefts(options: dict[str, Any], tmp_path: Path):
    model, inputs = _model(options), _inputs()
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), peft.PrefixTuningConfig(**OPTIONS)).eval()
    theirs.save_pretrained(str(tmp_path))
    ours: Any = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    # what a model gives for padding has no meaning
    seen = inputs["attention_mask"].bool()
    expected = theirs(**inputs).logits[seen]
    laws.require_close(ours(**inputs).logits[seen], expected, 1e-5, "ours and theirs")
    assert not torch.allclose(expected, model(**inputs).logits[seen])


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_generated_tokens_are_those_of_the_logits(options: dict[str, Any]):
    adapted: Any = get_peft_model(_model(options), PrefixTuningConfig(**OPTIONS)).eval()
    ids = _inputs()["input_ids"]
    generated = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    for _ in range(3):
        ids = torch.cat([ids, adapted(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_prefix_of_each_layer_that_keeps_keys_is_trained(options: dict[str, Any]):
    adapted: Any = get_peft_model(_model(options), PrefixTuningConfig(**OPTIONS))
    adapted(**_inputs()).logits.square().sum().backward()
    (prefix,) = [tensor for tensor in adapted.parameters() if tensor.requires_grad]
    layers = 6 - options.get("num_kv_shared_layers", 2)
    by_layer = prefix.grad.view(3, 6, -1).abs().sum((0, 2))
    assert [bool(total) for total in by_layer] == [layer < layers for layer in range(6)]


def test_a_prefix_that_some_layers_are_too_wide_for_is_refused_with_the_sizes_that_fit_all():
    model = _model(FEWER_HEADS)
    before = laws.snapshot(model)
    with pytest.raises(AdaptError, match="2 of 4 layers have keys of 2 heads of size 8") as caught:
        get_peft_model(model, PrefixTuningConfig(**OPTIONS))
    laws.require_unchanged(model, before, "a refused adaptation")
    assert "set token_dim=32 and num_attention_heads=2" in str(caught.value)
    config = PrefixTuningConfig(**OPTIONS, token_dim=32, num_attention_heads=2)
    adapted: Any = get_peft_model(model, config)
    adapted(**_inputs()).logits.square().sum().backward()
    (prefix,) = [tensor for tensor in adapted.parameters() if tensor.requires_grad]
    by_layer = prefix.grad.view(3, 6, -1).abs().sum((0, 2))
    assert [bool(total) for total in by_layer] == [True, True, True, True, False, False]
