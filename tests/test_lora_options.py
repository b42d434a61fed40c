"""Each key of PEFT's `LoraConfig` acts, is recorded, or is refused by its name: nothing is ignored in silence."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import call, llama_config, result, tiny_classifier

import graphpeft
from graphpeft.testing import laws

pytestmark = pytest.mark.quick("methods")

PAGE = Path(__file__).parent.parent / "docs" / "lora.md"

KEYS = sorted(peft.LoraConfig().to_dict())

DEFAULTS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}

TIED_ROWS: dict[str, Any] = {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}


def _loftq(bits: int) -> dict[str, Any]:
    return {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": bits, "loftq_iter": 1}}


ACTING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alora_invocation_tokens": ({"alora_invocation_tokens": [5]}, {}),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 5}}, {}),
    "arrow_config": ({"arrow_config": {"top_k": 1, "task_adapter_names": ["task_0"]}}, {}),
    "bias": ({"target_modules": ["query"], "bias": "all"}, {"target_modules": ["query"]}),
    "ensure_weight_tying": (TIED_ROWS | {"ensure_weight_tying": True}, TIED_ROWS),
    "exclude_modules": ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, {}),
    "inference_mode": ({"inference_mode": True}, {}),
    "init_lora_weights": ({"init_lora_weights": "gaussian"}, {}),
    "kasa_config": ({"kasa_config": {"beta": 1}}, {}),
    "layer_replication": ({"layer_replication": [(0, 2), (0, 2)]}, {}),
    "layers_pattern": ({"layers_to_transform": [1], "layers_pattern": "blocks"}, {"layers_to_transform": [1]}),
    "layers_to_transform": ({"layers_to_transform": [1]}, {}),
    "loftq_config": (_loftq(4), _loftq(8)),
    "lora_alpha": ({"lora_alpha": 3}, {}),
    "lora_bias": ({"lora_bias": True}, {}),
    "lora_dropout": ({"lora_dropout": 0.5}, {}),
    "monteclora_config": ({"monteclora_config": {"buffer_size": 1}}, {}),
    "modules_to_save": ({"modules_to_save": ["norm"]}, {}),
    "r": ({"r": 2}, {}),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, {}),
    "target_modules": ({"target_modules": ["up_proj"]}, {}),
    "target_parameters": ({"target_parameters": ["0.mlp.up_proj.weight"]}, {}),
    "task_type": ({"target_modules": ["query"], "task_type": "SEQ_CLS"}, {"target_modules": ["query"]}),
    "trainable_token_indices": ({"trainable_token_indices": [3]}, {}),
    "use_bdlora": ({"use_bdlora": {"target_modules_bd_a": ["_proj"], "nblocks": 2}}, {}),
    "use_dora": ({"use_dora": True}, {}),
    "use_rslora": ({"use_rslora": True}, {}),
}
"""Options with a key and without it, which make different models, or of which one is refused."""

MEASURED = {
    "corda_config": "test_lora_measured.py::test_cordas_values_are_pefts",
    "eva_config": "test_lora_measured.py::test_evas_values_and_ranks_are_pefts",
    "lora_ga_config": "test_lora_measured.py::test_lora_gas_values_are_pefts",
    "velora_config": "test_velora.py::test_several_steps_are_pefts_also_after_loading",
}
"""Keys that show only after measuring or in gradients, with the tests that compare their values."""

RECORDED: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "here"},
    "base_model_name_or_path": "somewhere",
    "fan_in_fan_out": False,
    "peft_type": "LORA",
    "peft_version": "0.1",
    "revision": "main",
}
"""Keys that are written to the file, with what comes out of it; how a weight is stored is read from the model."""

REFUSED: dict[str, Any] = {
    "megatron_config": {"a": 1},
    "megatron_core": "other.core",
    "qalora_group_size": 32,
    "use_qalora": True,
}
"""Values of keys that aren't supported."""


def build(targets: Any = ("q_proj",)) -> Any:
    """Builds a Llama with tied embeddings, or a BERT that classifies, where that has the targets."""
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=True))
    return (tiny_classifier() if "query" in targets else llama).eval()


def test_every_key_of_pefts_is_looked_at_once() -> None:
    assert sorted([*ACTING, *MEASURED, *RECORDED, *REFUSED]) == KEYS


def test_what_pefts_config_has_beside_its_keys_is_refused_by_its_name() -> None:
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} - set(KEYS) == {"runtime_config"}
    [name] = [field.name for field in dataclasses.fields(peft.LoraRuntimeConfig)]
    theirs = peft.LoraConfig(**DEFAULTS, runtime_config=peft.LoraRuntimeConfig(**{name: True}))
    model = build()
    before = laws.snapshot(model)
    with pytest.raises(ValueError, match=f"{name}=True isn't supported"):
        graphpeft.get_peft_model(model, theirs)
    laws.require_unchanged(model, before, "a refused adaptation")


def test_every_key_has_a_row_in_the_page() -> None:
    lines = PAGE.read_text().partition("| key | here |")[2].partition("\n\n")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    named = [key for keys, _ in rows for key in re.findall(r"`(\w+)`", keys)]
    assert sorted(named) == KEYS
    refused = [keys for keys, says in rows if says.startswith("refused")]
    assert {key for keys in refused for key in re.findall(r"`(\w+)`", keys)} == set(REFUSED)


def seen(options: dict[str, Any]) -> dict[str, Any]:
    """Returns what a model has and computes with these options, or why it is refused."""
    config = graphpeft.LoraConfig(**DEFAULTS | options)
    model = build(config.target_modules)
    torch.manual_seed(1)
    try:
        graphpeft.get_peft_model(model, config)
    except graphpeft.AdaptError as error:
        return {"refused": str(error)}
    with torch.no_grad():
        outputs = []
        for mode in (False, True):
            torch.manual_seed(2)
            outputs.append(result(call(model.train(mode), {"input_ids": torch.arange(3, 10)[None]})))
    parameters = dict(model.named_parameters())
    return {
        "trained": [name for name, parameter in parameters.items() if parameter.requires_grad],
        "shapes": {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        "outputs": outputs,
    }


@pytest.mark.parametrize("key", ACTING)
def test_a_key_acts(key: str) -> None:
    with_it, without = ACTING[key]
    laws.require_equal(seen(with_it), seen(with_it), "equal options make different models")
    with pytest.raises(laws.LawError):
        laws.require_equal(seen(with_it), seen(without), "what the key makes of it")


@pytest.mark.parametrize("key", MEASURED)
def test_what_acts_after_measuring_is_compared_by_a_test(key: str) -> None:
    file, name = MEASURED[key].split("::")
    source = (Path(__file__).parent / file).read_text()
    assert f"def {name}(" in source
    assert key in source


@pytest.mark.parametrize("key", RECORDED)
def test_a_key_is_recorded(key: str, tmp_path: Path) -> None:
    # those of the class and of the model itself are not the user's
    own = {} if key in ("peft_type", "fan_in_fan_out") else {key: RECORDED[key]}
    wrong: dict[str, Any] = {"fan_in_fan_out": True} if key == "fan_in_fan_out" else {}
    model = graphpeft.get_peft_model(build(), graphpeft.LoraConfig(**DEFAULTS | own | wrong))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())[key] == RECORDED[key]


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("is_dry", [False, True], ids=["adapt", "explain"])
def test_a_key_is_refused_by_its_name(key: str, is_dry: bool) -> None:
    model = build()
    before = laws.snapshot(model)
    config = graphpeft.LoraConfig(**DEFAULTS | {key: REFUSED[key]})
    with pytest.raises(graphpeft.AdaptError, match=rf"^{key}=.* is not supported; leave it "):
        (graphpeft.explain if is_dry else graphpeft.get_peft_model)(model, config)
    laws.require_unchanged(model, before, "a refused adaptation")


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_in_a_file_is_refused_by_its_name(key: str, tmp_path: Path) -> None:
    graphpeft.get_peft_model(build(), graphpeft.LoraConfig(**DEFAULTS)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: REFUSED[key]}))
    model = build()
    before = laws.snapshot(model)
    with pytest.raises(graphpeft.AdaptError, match=rf"{key}=.* is not supported"):
        graphpeft.PeftModel.from_pretrained(model, tmp_path)
    laws.require_unchanged(model, before, "a refused load")
