"""PEFT's own functions that get and set an adapter's tensors do on a model of this library what its own functions do.

accelerate saves sharded checkpoints by them, and trl keeps copies of adapters by them.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from models import CLASSIFIER, LLAMA, output
from torch import Tensor
from torch.testing import assert_close

import graphpeft
from graphpeft import AdaptError, CheckpointError, get_peft_model

pytestmark = pytest.mark.quick("model")

TARGETS = {"target_modules": ["q_proj", "embed_tokens"]}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", TARGETS | {"r": 2, "lora_alpha": 5}),
    "LoRA with DoRA, biases and a copy of the head": (
        "LoraConfig",
        {"target_modules": ["q_proj"], "use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"]},
    ),
    "trained tokens": ("LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "LoRA of weights": ("LoraConfig", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "VeRA": ("VeraConfig", {"target_modules": ["q_proj"], "r": 2}),
    "IA3": ("IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "a prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "a prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
}


def adapted(library: Any, name: str, seed: int = 0) -> Any:
    """Returns a model whose adapter has values that its method doesn't start with."""
    method, options = CONFIGS[name]
    torch.manual_seed(seed)
    model = library.get_peft_model(LLAMA.build(), getattr(library, method)(task_type="CAUSAL_LM", **options))
    return shaken(model.eval(), seed)


def shaken(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_close(dict(sorted(found.items())), dict(sorted(expected.items())))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_they_get_and_set_all_tensors_by_pefts_names(name: str) -> None:
    model, other = adapted(graphpeft, name), adapted(graphpeft, name, seed=1)
    found = peft.get_peft_model_state_dict(model)
    close(found, graphpeft.get_peft_model_state_dict(model))
    assert found.keys() == peft.get_peft_model_state_dict(adapted(peft, name)).keys()
    before = output(model, LLAMA.inputs())
    assert not torch.equal(output(other, LLAMA.inputs()), before)
    result = peft.set_peft_model_state_dict(other, {key: value.clone() for key, value in found.items()})
    assert torch.equal(output(other, LLAMA.inputs()), before)
    held = {key for key, parameter in other.named_parameters() if parameter.requires_grad}
    assert not result.unexpected_keys
    assert held.isdisjoint(result.missing_keys)


def test_what_pefts_model_gives_is_set() -> None:
    model, theirs = adapted(graphpeft, "LoRA"), adapted(peft, "LoRA", seed=1)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(theirs, save_embedding_layers=False))
    assert_close(output(model, LLAMA.inputs()), output(theirs, LLAMA.inputs()))


def test_embeddings_have_their_names_in_files() -> None:
    ours, theirs = (
        peft.get_peft_model_state_dict(adapted(library, "VeRA"), save_embedding_layers=True)
        for library in (graphpeft, peft)
    )
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("name", ["layers", "other"])
def test_one_of_several_adapters_is_read_and_set(name: str) -> None:
    model = adapted(graphpeft, "LoRA")
    config = graphpeft.LoraConfig(r=3, lora_alpha=7, target_modules=["v_proj"], init_lora_weights=False)
    model.add_adapter(name, config)
    ours = {key: graphpeft.get_peft_model_state_dict(model, adapter_name=key) for key in ("default", name)}
    for key, values in ours.items():
        close(peft.get_peft_model_state_dict(model, adapter_name=key), values)
    changed = {key: value + 1 for key, value in ours[name].items()}
    peft.set_peft_model_state_dict(model, changed, adapter_name=name)
    close(graphpeft.get_peft_model_state_dict(model, adapter_name=name), changed)
    close(graphpeft.get_peft_model_state_dict(model), ours["default"])


def test_a_state_dict_that_is_given_is_read() -> None:
    model = adapted(graphpeft, "VeRA")
    given = {key: value + 1 for key, value in model.state_dict().items()}
    close(peft.get_peft_model_state_dict(model, given), graphpeft.get_peft_model_state_dict(model, given))


def test_tensors_that_do_not_fit_are_an_error_and_set_nothing() -> None:
    model = adapted(graphpeft, "VeRA")
    values, before = peft.get_peft_model_state_dict(model), output(model, LLAMA.inputs())
    lost = next(iter(values))
    changed = {key: value + 1 for key, value in values.items() if key != lost}
    with pytest.raises(CheckpointError, match=lost):
        peft.set_peft_model_state_dict(model, changed)
    model.merge_adapter()
    with pytest.raises(AdaptError, match="is merged into the weights"):
        peft.set_peft_model_state_dict(model, values)
    model.unmerge_adapter()
    assert_close(output(model, LLAMA.inputs()), before)


def test_a_release_of_peft_without_these_classes_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    places: Any = (peft, peft.utils.save_and_load)
    earlier = {name: type(name, (), {}) for name in peft.PEFT_TYPE_TO_TUNER_MAPPING if "graphpeft" not in name}
    for module in places:
        monkeypatch.setattr(module, "PEFT_TYPE_TO_TUNER_MAPPING", earlier)
    model = adapted(graphpeft, "LoRA")
    with pytest.raises(ValueError, match="call graphpeft's own get_peft_model_state_dict"):
        peft.get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match="call graphpeft's own get_peft_model_state_dict"):
        peft.set_peft_model_state_dict(model, {})


def test_configs_of_a_model_are_its_own_for_all_others() -> None:
    model: Any = get_peft_model(CLASSIFIER.build(), CLASSIFIER.config())
    peft.get_peft_model_state_dict(model)
    assert list(model.peft_config) == ["default"]
    assert model.peft_config["default"].peft_type == "LORA"
