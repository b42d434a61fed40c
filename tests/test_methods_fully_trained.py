"""Methods that train tensors of the model itself: names, values, files and gradients of both beside PEFT's."""

from __future__ import annotations

import functools
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from models import BERT, GPT2, LLAMA, Example, equal, llama_config, output
from oracle import perturb
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM

import graphpeft
from graphpeft import (
    AdaptError,
    LNTuningConfig,
    TargetedConfig,
    TrainableTokensConfig,
    get_peft_model,
    register,
)
from graphpeft.testing import assert_copies_stay_adapted, laws
from graphpeft.testing.snapshots import with_saved

# what PEFT warns of is PEFT's
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:Setting `save_embedding_layers`")


class Convolutional(nn.Module):
    """A norm with buffers, and a module with others inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.projector = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.norm(x))


class Recurrent(nn.Module):
    """A recurrent layer, which computes with a list of its parameters."""

    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.rnn, self.head = cls(4, 3, num_layers=2, bidirectional=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(tie_word_embeddings=True)).eval()


CONVOLUTIONAL = Example("convolutional", Convolutional, lambda g: (torch.randn(5, 4, generator=g),), {})
RECURRENT = [
    Example(cls.__name__, functools.partial(Recurrent, cls), CONVOLUTIONAL.arguments, {})
    for cls in (nn.LSTM, nn.GRU, nn.RNN)
]
TIED = Example("tied-llama", tied_llama, LLAMA.arguments, {})

CASES = [
    pytest.param(LLAMA, "LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}, id="norms without biases"),
    pytest.param(GPT2, "LNTuningConfig", {}, id="default norms"),
    pytest.param(CONVOLUTIONAL, "LNTuningConfig", {"target_modules": ["norm"]}, id="a norm with buffers"),
    pytest.param(CONVOLUTIONAL, "LNTuningConfig", {"target_modules": ["projector"]}, id="a module with others inside"),
    *(pytest.param(each, "LNTuningConfig", {"target_modules": ["rnn"]}, id=each.name) for each in RECURRENT),
    pytest.param(
        LLAMA,
        "LNTuningConfig",
        {
            "target_modules": ["input_layernorm"],
            "exclude_modules": ["0.input_layernorm"],
            "modules_to_save": ["lm_head"],
        },
        id="beside modules_to_save",
    ),
    pytest.param(
        LLAMA, "TrainableTokensConfig", {"token_indices": [9, *range(20, 50)]}, id="rows of the input embedding"
    ),
    pytest.param(TIED, "TrainableTokensConfig", {"token_indices": [*range(50, 10, -1)]}, id="rows of a tied embedding"),
    pytest.param(
        LLAMA,
        "TrainableTokensConfig",
        {"token_indices": [*range(30)], "target_modules": ["embed_tokens"]},
        id="rows by name",
    ),
    pytest.param(
        LLAMA,
        "TrainableTokensConfig",
        {"token_indices": [5, 6, *range(30, 64)], "init_weights": False},
        id="random rows",
    ),
]
each_case = pytest.mark.parametrize(("example", "method", "options"), CASES)


def ours(example: Example, method: str, options: Any) -> Any:
    model = example.build()
    torch.manual_seed(1)
    return get_peft_model(model, globals()[method](**options))


def theirs(example: Example, method: str, options: Any) -> Any:
    model = example.build()
    torch.manual_seed(1)
    return peft.get_peft_model(model, getattr(peft, method)(**options)).eval()


def tensors_of(model: Any) -> dict[str, Tensor]:
    read = graphpeft.get_peft_model_state_dict if isinstance(model, graphpeft.PeftModel) else None
    return {name: tensor.clone() for name, tensor in (read or peft.get_peft_model_state_dict)(model).items()}


@each_case
def test_tensors_have_pefts_names_shapes_and_values(example: Example, method: str, options: Any) -> None:
    found, expected = (tensors_of(make(example, method, options)) for make in (ours, theirs))
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@each_case
def test_files_go_both_ways(example: Example, method: str, options: Any, tmp_path: Path) -> None:
    inputs = example.inputs()
    for make, load in (
        (ours, peft.PeftModel.from_pretrained),
        (theirs, graphpeft.PeftModel.from_pretrained),
        (ours, graphpeft.PeftModel.from_pretrained),
    ):
        model = make(example, method, options)
        perturb(model)
        assert (output(model, inputs) - output(example.build(), inputs)).abs().max() > 1e-2
        folder = tmp_path / f"{make.__name__}-{load.__func__.__module__}"
        model.save_pretrained(str(folder))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*[Uu]nexpected keyword")
            loaded: Any = load(example.build(), str(folder))
        torch.testing.assert_close(output(loaded.eval(), inputs), output(model, inputs), rtol=1e-5, atol=1e-6)


def test_a_module_with_others_inside_is_loaded_under_any_name(tmp_path: Path) -> None:
    model, inputs = ours(CONVOLUTIONAL, "LNTuningConfig", {"target_modules": ["projector"]}), CONVOLUTIONAL.inputs()
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = graphpeft.PeftModel.from_pretrained(CONVOLUTIONAL.build(), tmp_path, "another")
    assert torch.equal(output(loaded, inputs), output(model, inputs))


@each_case
def test_the_config_file_has_pefts_keys(example: Example, method: str, options: Any, tmp_path: Path) -> None:
    ours(example, method, options).save_pretrained(tmp_path / "ours")
    theirs(example, method, options).save_pretrained(str(tmp_path / "theirs"))
    found, expected = (json.loads((tmp_path / of / "adapter_config.json").read_text()) for of in ("ours", "theirs"))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(expected.get(name), list):
            found[name], expected[name] = sorted(found[name]), sorted(expected[name])
    assert found == expected


@each_case
def test_merged_is_active_and_unloaded_is_the_base(example: Example, method: str, options: Any) -> None:
    model, inputs = ours(example, method, options), example.inputs()
    perturb(model)
    expected, base = output(model, inputs), example.build()
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), output(base, inputs))
    torch.testing.assert_close(output(model.merge_and_unload(), inputs), expected, rtol=1e-5, atol=1e-6)
    model = ours(example, method, options)
    perturb(model)
    left = with_saved(base, model)
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == left.state_dict().keys()
    assert torch.equal(output(unloaded, inputs), output(left, inputs))


@each_case
def test_gradients_are_pefts(example: Example, method: str, options: Any) -> None:
    found = {}
    for make in (ours, theirs):
        model = make(example, method, options)
        names = {tensor.data_ptr(): name for name, tensor in tensors_by_place(model).items()}
        graphs = example.inputs()
        called = model(**graphs) if isinstance(graphs, dict) else model(*graphs)
        (
            called if isinstance(called, Tensor) else called.logits if "logits" in called else called[0]
        ).square().mean().backward()
        found[make] = {names[p.data_ptr()]: p.grad for p in model.parameters() if p.requires_grad}
    assert found[ours].keys() == found[theirs].keys()
    for name, gradient in found[theirs].items():
        torch.testing.assert_close(found[ours][name], gradient, rtol=1e-4, atol=1e-6)


def tensors_by_place(model: Any) -> dict[str, Tensor]:
    read = graphpeft.get_peft_model_state_dict if isinstance(model, graphpeft.PeftModel) else None
    return (read or peft.get_peft_model_state_dict)(model)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            lambda: LNTuningConfig(target_modules=["nrom"]),
            r"target_modules: nothing in .* matches .*near misses: .*norm",
        ),
        (lambda: LNTuningConfig(target_modules=["mlp", "up_proj"]), r"mlp.up_proj: it is inside of .*mlp, which is"),
        (
            lambda: LNTuningConfig(target_modules=["mlp"], modules_to_save=["up_proj"]),
            r"mlp.up_proj: it is inside of .*mlp, which is fully trained",
        ),
        (
            lambda: TrainableTokensConfig(token_indices=[1, 999]),
            r"rows 0 to 63, and none of index 999.*change token_ind",
        ),
        (lambda: TrainableTokensConfig(token_indices=[1], target_modules=["norm"]), r"has no table whose rows"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(config: Any, reason: str) -> None:
    model = LLAMA.build()
    before = dict(vars(model))
    with pytest.raises(AdaptError, match=reason):
        get_peft_model(model, config())
    assert vars(model) == before


def test_what_a_method_lacks_is_no_option_of_it(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="LNTuningConfig has no option 'layers_pattern'"):
        LNTuningConfig(target_modules=["norm"], layers_pattern="layers")
    config = LNTuningConfig(target_modules=["norm"])
    config.layers_to_transform = [0]
    with pytest.raises(AdaptError, match="LNTuningConfig has no option 'layers_to_transform'; leave it None"):
        get_peft_model(LLAMA.build(), config)
    LNTuningConfig(target_modules=["norm"]).save_pretrained(tmp_path)
    assert "layers_pattern" not in json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.parametrize("example", RECURRENT, ids=lambda example: example.name)
def test_a_recurrent_layer_is_compiled_with_what_stands_in(example: Example) -> None:
    model: Any = get_peft_model(example.build(), LNTuningConfig(target_modules=["rnn"]))
    perturb(model)
    inputs, compiled = example.inputs(), torch.compile(model, backend="eager")
    assert not equal(model(*inputs), example.build()(*inputs))
    with torch.no_grad():
        assert equal(compiled(*inputs), model(*inputs))


def test_a_task_brings_no_head_to_a_method_without_modules_to_save() -> None:
    def build() -> nn.Module:
        sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).eval()

    mine = get_peft_model(build(), TrainableTokensConfig(token_indices=[1], task_type=graphpeft.TaskType.SEQ_CLS))
    their_config = peft.TrainableTokensConfig(token_indices=[1], task_type="SEQ_CLS")
    yours: Any = peft.get_peft_model(build(), their_config)
    assert sorted(tensors_of(mine)) == sorted(tensors_of(yours))


def test_a_method_cannot_lack_what_its_base_classes_do_not_have() -> None:
    with pytest.raises(TypeError, match=r"Lacking\.lacks names 'exclude', which no base class of it has"):

        @register
        @dataclass(kw_only=True)
        class Lacking(TargetedConfig):
            peft_type: ClassVar[str] = "LACKING"
            lacks: ClassVar[frozenset[str]] = frozenset({"exclude"})


def test_two_adapters_that_fully_train_a_norm_do_not_act_together() -> None:
    model = ours(LLAMA, "LNTuningConfig", {"target_modules": ["norm"]})
    model.add_adapter("other", LNTuningConfig(target_modules=["norm"]))
    with pytest.raises(AdaptError, match="fully train"):
        model.set_adapter(["default", "other"])


LAWS = [
    laws.assert_fresh_adapter_changes_no_output,
    laws.assert_only_the_adapter_is_trained,
    laws.assert_saved_is_loaded,
    laws.assert_traced_is_adapted_alike,
    assert_copies_stay_adapted,
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    "config",
    [lambda: LNTuningConfig(target_modules=["LayerNorm"]), lambda: TrainableTokensConfig(token_indices=[3, 4])],
    ids=["norms", "rows"],
)
def test_a_law_holds(law: Any, config: Any) -> None:
    law(BERT.build, config(), BERT.inputs())
