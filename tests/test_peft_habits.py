"""What users of PEFT are used to, and find here."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import LLAMA, MLP, T5
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

import graphpeft
from graphpeft import PeftModel, get_peft_model

LoraConfig: Any = graphpeft.LoraConfig
PeftConfig: Any = graphpeft.PeftConfig

X = torch.linspace(-1, 1, 16).reshape(2, 8)


def perturbed(model: Any) -> Any:
    """Returns a model whose parameters differ from each other."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return model


# several active adapters


def test_the_active_adapter_is_what_set_adapter_takes() -> None:
    model = get_peft_model(MLP.build(), LoraConfig(target_modules=["up"]))
    model.add_adapter("other", LoraConfig(target_modules=["down"]))
    assert model.active_adapter == "default"
    model.set_adapter(["default", "other"])
    before = model.active_adapter
    assert before == model.base_model.active_adapter == ["default", "other"]
    model.set_adapter("other")
    assert model.active_adapter == "other"
    model.set_adapter(before)
    assert model.active_adapters == ["default", "other"]
    assert model.active_peft_config is model.peft_config["default"]
    assert model.peft_type == "LORA"
    with pytest.raises(ValueError, match=r"adapter_name is \['default', 'other'\], .*pass one name"):
        graphpeft.get_peft_model_state_dict(model, adapter_name=model.active_adapter)


# tensors without values


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "inject", "inject_state_dict"])
def test_tensors_without_values_get_those_of_a_file(how: str) -> None:
    config = LoraConfig(target_modules=["up", "down"], r=2)
    filled = perturbed(get_peft_model(MLP.build(), config))
    values = graphpeft.get_peft_model_state_dict(filled)
    model: Any = MLP.build()
    if how == "get_peft_model":
        get_peft_model(model, config, low_cpu_mem_usage=True)
    elif how == "add_adapter":
        get_peft_model(model, LoraConfig(target_modules=["up"]), "first")
        model.add_adapter("default", config, low_cpu_mem_usage=True)
    else:
        of_file: dict[str, Any] = {"state_dict": values} if how == "inject_state_dict" else {}
        graphpeft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True, **of_file)
    own = [p for name, p in model.named_parameters() if ".default.lora_" in name]
    assert {p.device.type for p in own} == {"meta"}
    model.set_adapter("default")
    with pytest.raises(RuntimeError, match="has no values yet"):
        model(X)
    graphpeft.set_peft_model_state_dict(model, values, low_cpu_mem_usage=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(p.requires_grad for name, p in model.named_parameters() if ".default.lora_" in name)
    found = graphpeft.get_peft_model_state_dict(model)
    assert all(torch.equal(found[name], value) for name, value in values.items())
    model.load_state_dict({n: v for n, v in filled.state_dict().items() if "lora_" not in n}, strict=False)
    torch.testing.assert_close(model(X), filled(X))


@pytest.mark.parametrize("do", ["save", "merge"])
def test_tensors_without_values_are_neither_saved_nor_merged(do: str, tmp_path: Path) -> None:
    model = get_peft_model(MLP.build(), LoraConfig(target_modules=["up"]), low_cpu_mem_usage=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    with pytest.raises(graphpeft.AdaptError, match=r"'default' has no values yet.*load"):
        model.save_pretrained(tmp_path) if do == "save" else model.merge_adapter()
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_tensors_that_sites_share_remain_one_tensor() -> None:
    config = graphpeft.VBLoRAConfig(target_modules=["0", "1"], r=2, num_vectors=4, vector_length=4, topk=2)
    filled: Any = perturbed(get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config))
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config, low_cpu_mem_usage=True)
    graphpeft.set_peft_model_state_dict(model, graphpeft.get_peft_model_state_dict(filled))
    assert [len(list(each.parameters())) for each in (model, filled)] == [len(list(filled.parameters()))] * 2
    model.load_state_dict(filled.state_dict())
    torch.testing.assert_close(model(X), filled(X))


# methods


def test_the_table_of_tuners_adapts_by_each_method() -> None:
    tuners = graphpeft.PEFT_TYPE_TO_TUNER_MAPPING
    assert set(tuners) == set(graphpeft.PEFT_TYPE_TO_CONFIG_MAPPING)
    assert len(tuners) == len(graphpeft.PEFT_TYPE_TO_CONFIG_MAPPING)
    assert not tuners["VERA"].uses_shared_state
    assert tuners["IA3"].prefix == "ia3_"
    model: Any = MLP.build()
    config = LoraConfig(target_modules=["up"])
    assert tuners["LORA"](model, {"mine": config}, "mine") is model
    assert list(model.peft_config) == ["mine"]
    with pytest.raises(TypeError, match="the config is a LoraConfig; pass a IA3Config"):
        tuners["IA3"](MLP.build(), config, "default")


# configs


def test_unknown_keys_are_told_in_one_warning(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path)
    values = LoraConfig.from_json_file(tmp_path / "adapter_config.json")
    with pytest.warns(UserWarning, match="keys that LoraConfig doesn't know.*'foobar', 'spam'") as warned:
        graphpeft.LoraConfig.from_peft_type(**values, foobar=1, spam=2)
    assert len(warned) == 1


def test_what_is_of_one_run_is_no_key_of_a_file(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 3', '"r": 3, "runtime_config": {"ephemeral_gpu_offload": true}'))
    assert "runtime_config" not in LoraConfig.from_json_file(file)
    assert LoraConfig.from_pretrained(tmp_path) == LoraConfig(r=3)


def test_former_options_of_the_hub_are_taken_as_none(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path, proxies=None, resume_download=False) == LoraConfig(r=3)
    with pytest.raises(TypeError, match="proxies: not an option here"):
        PeftConfig.from_pretrained(tmp_path, proxies={"https": "example.org"})


# names


def test_the_names_of_targets_are_pefts_in_its_order() -> None:
    for library in (peft, graphpeft):
        model = library.get_peft_model(
            nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))),
            library.LoraConfig(target_modules=["2"], modules_to_save=["3"]),
        )
        model.add_adapter("other", library.LoraConfig(target_modules=["0", "2"]))
        assert model.base_model.targeted_module_names == ["2", "0"]
        assert model.base_model.targeted_parameter_names == []
        model = library.get_peft_model(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
            library.LoraConfig(target_modules=["0"], target_parameters=["1.weight"]),
        )
        assert model.base_model.targeted_module_names == ["0"]
        assert model.targeted_parameter_names == ["1.weight"]


@pytest.mark.parametrize("kind", [graphpeft.PromptEncoderConfig, graphpeft.PromptTuningConfig])
def test_the_prompt_encoder_has_the_tensors_of_the_prompts(kind: Any) -> None:
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(LLAMA.build(), config)
    model.add_adapter("other", config)
    assert set(model.prompt_encoder) == {"default", "other"}
    own = {name: parameter for name, parameter in model.named_parameters() if "prompt" in name}
    assert {id(p) for p in model.prompt_encoder.parameters()} == {id(p) for p in own.values()}
    model.set_adapter("other")
    assert all(p.requires_grad for p in model.prompt_encoder["other"].parameters())
    adapted = get_peft_model(LLAMA.build(), LoraConfig(target_modules=["q_proj"]))
    assert not hasattr(adapted, "prompt_encoder")


def test_the_prompt_encoder_of_a_pair_is_that_of_its_encoder() -> None:
    config = graphpeft.PromptTuningConfig(task_type=graphpeft.TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=3)
    model = get_peft_model(T5.build(), config)
    own = [parameter for name, parameter in model.named_parameters() if "prompt" in name]
    assert [id(p) for p in model.prompt_encoder["default"].parameters()] == [id(p) for p in own]


def test_the_prompt_encoder_of_several_scopes_has_a_list() -> None:
    config = graphpeft.PromptTuningConfig(num_virtual_tokens=3, prompt_scope=["layers.0", "layers.1"], token_dim=32)
    model = get_peft_model(LLAMA.build(), config)
    own = [parameter for name, parameter in model.named_parameters() if "prompt" in name]
    assert len(own) == len(model.prompt_encoder["default"]) == 2


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_saved_adapter_of_the_same_name_gives_its_values(is_trainable: bool, tmp_path: Path) -> None:
    model = perturbed(get_peft_model(MLP.build(), LoraConfig(target_modules=["up"], lora_alpha=3)))
    model.save_pretrained(tmp_path)
    expected, tensor = model(X), model.head.weight
    with torch.no_grad():
        model.get_submodule("first.up").default.lora_B.zero_()
    model.add_adapter("other", LoraConfig(target_modules=["down"]))
    model.set_adapter("other")
    model.train()
    with pytest.warns(graphpeft.PeftWarning, match="the model has an adapter 'default' already, which gets the saved"):
        assert PeftModel.from_pretrained(model, tmp_path, is_trainable=is_trainable) is model
    assert model.active_adapter == "default"
    assert model.training == is_trainable
    assert {p.requires_grad for n, p in model.named_parameters() if ".default." in n} == {is_trainable}
    assert model.head.weight is tensor
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.4}, {"init_lora_weights": "pissa"}], ids=["dropout", "pissa"])
def test_an_adapter_is_loaded_over_itself_whatever_the_order_of_its_layers(options: Any, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.inner, self.w = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.up(x)) @ self.w

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["w", "up", "inner"], **options)).eval()
    found = model(X[:, :8])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lora_dropout=0.4 is saved as 0")
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model.eval()(X[:, :8]), found)


def test_a_saved_adapter_of_the_same_name_and_other_options_is_refused(tmp_path: Path) -> None:
    get_peft_model(MLP.build(), LoraConfig(target_modules=["up"], lora_alpha=3)).save_pretrained(tmp_path)
    model = get_peft_model(MLP.build(), LoraConfig(target_modules=["up"], lora_alpha=5))
    model.add_adapter("other", LoraConfig(target_modules=["down"]))
    model.set_adapter("other")
    with pytest.raises(graphpeft.AdaptError, match="an adapter 'default' with other options"):
        PeftModel.from_pretrained(model, tmp_path)
    assert model.active_adapter == "other"


# a base config


def test_a_config_of_no_class_is_made_for_a_method(tmp_path: Path) -> None:
    options = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": False, "revision": "main"}
    ours, theirs = (library.PeftConfig(**options) for library in (graphpeft, peft))
    assert ours.peft_type == theirs.peft_type == "LORA"
    assert isinstance(ours, peft.PeftConfig)
    assert not isinstance(ours, peft.LoraConfig)
    keys = set(options)
    assert {k: v for k, v in ours.to_dict().items() if k in keys} == {k: theirs.to_dict()[k] for k in keys}
    assert PeftConfig().peft_type is None
    assert "LORA" in repr(ours)
    assert ours == PeftConfig(**options) != PeftConfig(**options | {"peft_type": "IA3"})
    with pytest.raises(ValueError, match="peft_type is 'LORE'"):
        PeftConfig(peft_type="LORE")


def test_a_config_of_no_class_adapts_by_its_methods_defaults() -> None:
    model = get_peft_model(LLAMA.build(), PeftConfig(peft_type="LORA", task_type="CAUSAL_LM"))
    assert type(model.peft_config["default"]) is LoraConfig
    assert {path.rpartition(".")[2] for path in model.targeted_module_names} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="no peft_type"):
        get_peft_model(MLP.build(), PeftConfig())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_pefts_own_function_says_what_to_call_for_an_adapted_model() -> None:
    model = get_peft_model(MLP.build(), LoraConfig(target_modules=["up"]))
    with pytest.raises(TypeError, match=r"adapted by graphpeft.*graphpeft\.get_peft_model\(model, config, name\)"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["down"]), "other")
    assert list(model.peft_config) == ["default"]
    assert get_peft_model(model, peft.LoraConfig(target_modules=["down"]), "other") is model


# tensors of other sizes


class Words(nn.Module):
    """An embedding of some size, a layer and a head."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.emb, self.up, self.head = nn.Embedding(words, 8), nn.Linear(8, 4), nn.Linear(4, words)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a score for each word."""
        return self.head(self.up(self.emb(x)))


WORDS = {"target_modules": ["emb", "up"], "modules_to_save": ["head"]}
LEFT_OUT = r"lora_embedding_A of shape \(8, 100\) for \(8, 105\), .*head.weight of shape \(100, 4\) for \(105, 4\)"


def saved_words(library: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Saves an adapter for 100 words, and returns its tensors."""
    torch.manual_seed(0)
    model = perturbed(library.get_peft_model(Words(100), library.LoraConfig(**WORDS, init_lora_weights=False)))
    model.save_pretrained(folder)
    return library.get_peft_model_state_dict(model)


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "load_again", "set"])
def test_tensors_of_other_sizes_are_left_out_with_a_warning(how: str, tmp_path: Path) -> None:
    saved = saved_words(peft, tmp_path)
    model: Any = Words(105)
    base = model.head.weight
    with pytest.raises(graphpeft.CheckpointError, match=r"lora_embedding_A of shape \(8, 100\)"):
        PeftModel.from_pretrained(model, tmp_path)
    if how != "from_pretrained":
        get_peft_model(model, LoraConfig(**WORDS), "first" if how == "load_adapter" else "default")
    name = "other" if how == "load_adapter" else "default"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loads = {
        "from_pretrained": lambda: PeftModel.from_pretrained(model, tmp_path, ignore_mismatched_sizes=True),
        "set": lambda: graphpeft.set_peft_model_state_dict(model, saved, ignore_mismatched_sizes=True),
    }
    with pytest.warns(graphpeft.PeftWarning, match=LEFT_OUT):
        loads.get(how, lambda: model.load_adapter(tmp_path, name, ignore_mismatched_sizes=True))()
    found = graphpeft.get_peft_model_state_dict(model, adapter_name=name)
    fitting = [key for key, value in found.items() if value.shape == saved[key].shape]
    assert {key.removeprefix("base_model.model.") for key in found.keys() - fitting} == {
        "emb.lora_embedding_A",
        "head.bias",
        "head.weight",
    }
    assert all(torch.equal(found[key], saved[key]) for key in fitting)
    torch.testing.assert_close(found["base_model.model.head.weight"], base.detach())
    if how in ("set", "load_again"):
        assert torch.equal(found["base_model.model.emb.lora_embedding_A"], before["emb.default.lora_A"])
    assert model(torch.tensor([[104]])).isfinite().all()


def test_a_file_that_fits_is_loaded_whole_if_other_sizes_may_be_ignored(tmp_path: Path) -> None:
    saved = saved_words(graphpeft, tmp_path)
    model = PeftModel.from_pretrained(Words(100), tmp_path, ignore_mismatched_sizes=True)
    found = graphpeft.get_peft_model_state_dict(model)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], saved[key]) for key in found)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_tensor_too_few_is_an_error_if_other_sizes_may_be_ignored(tmp_path: Path) -> None:
    saved = saved_words(graphpeft, tmp_path)
    model: Any = get_peft_model(Words(105), LoraConfig(**WORDS))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del saved["base_model.model.up.lora_A.weight"]
    with (
        pytest.warns(graphpeft.PeftWarning, match=LEFT_OUT),
        pytest.raises(graphpeft.CheckpointError, match=r"lacks base_model\.model\.up\.lora_A\.weight"),
    ):
        graphpeft.set_peft_model_state_dict(model, saved, ignore_mismatched_sizes=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# layers


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("base_layer", r"model\.fc is the layer itself"),
        ("get_base_layer", r"model\.fc\.weight its weight"),
        ("lora_A", r"model\.fc\.default\.lora_A"),
        ("lora_B", r"model\.fc\.default\.lora_B"),
        ("lora_embedding_A", r"model\.fc\.default\.lora_A"),
        ("scaling", r"model\.fc\.default\.lora_scaling"),
        ("merged", r"model\.merged_adapters"),
    ],
)
def test_a_layer_says_what_to_use_in_place_of_what_wrappers_have(name: str, instead: str) -> None:
    model = get_peft_model(Words(9), LoraConfig(target_modules=["emb", "up"]))
    for layer in (model.emb, model.up):
        assert not hasattr(layer, name)
        assert getattr(layer, name, 5) == 5
        with pytest.raises(AttributeError, match=f"has no attribute '{name}': .*{instead}") as raised:
            getattr(layer, name)
        assert raised.value.name == name
    for layer in (model.head, model.unload().up):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'$"):
            getattr(layer, name)


class Scaled(nn.Linear):
    """A layer that has a scaling, and attributes that it computes."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scaling = 2.0
        self.base_layer = nn.Linear(8, 8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Scales."""
        return super().forward(input) * self.scaling

    def __getattr__(self, name: str) -> Any:
        return 7 if name == "lora_A" else super().__getattr__(name)


def test_attributes_of_a_module_itself_are_its_own() -> None:
    model = get_peft_model(nn.Sequential(Scaled()), LoraConfig(target_modules=["0"]))
    assert model[0].scaling == 2.0
    assert type(model[0].base_layer) is nn.Linear
    assert model[0].lora_A == 7
    with pytest.raises(AttributeError, match="has no attribute 'lora_B': an adapter's tensors"):
        model[0].lora_B  # noqa: B018
    with pytest.raises(AttributeError, match=r"has no attribute 'other'$"):
        model[0].other  # noqa: B018


# tasks


def classifier() -> Any:
    """Returns a tiny Llama that classifies sequences, whose head is called `score`."""
    return LlamaForSequenceClassification(LLAMA.build().config)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"])
def test_a_head_that_the_task_leaves_frozen_is_told(task: str) -> None:
    words = f"task_type {task} trains no head, .* has one, score, which stays frozen.*set task_type SEQ_CLS"
    with pytest.warns(graphpeft.PeftWarning, match=words):
        model = get_peft_model(classifier(), LoraConfig(task_type=task, target_modules=["q_proj"]))
    assert not any("score" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "options",
    [
        {"task_type": "SEQ_CLS"},
        {"task_type": "CAUSAL_LM", "modules_to_save": ["score"]},
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "score"]},
        {},
    ],
)
def test_nothing_is_told_of_a_head_that_is_trained_or_without_a_task(options: dict[str, Any]) -> None:
    get_peft_model(classifier(), LoraConfig(**{"target_modules": ["q_proj"]} | options))


# biases by a method's name


@pytest.mark.parametrize(
    ("name", "bias", "options"),
    [("Miss", "miss_only", {"r": 2}), ("AdaLora", "adalora_only", {"total_step": 9}), ("Lora", "lora_only", {})],
)
def test_biases_are_trained_by_the_methods_name_in_lower_case(
    name: str, bias: str, options: dict[str, Any], tmp_path: Path
) -> None:
    models = {}
    for library in (peft, graphpeft):
        config = getattr(library, f"{name}Config")(target_modules=["up"], bias=bias, **options)
        models[library] = library.get_peft_model(Words(9), config)
    ours = models[graphpeft]
    assert [n for n, p in ours.named_parameters() if p.requires_grad and n.endswith("bias")] == ["up.default.bias"]
    with torch.no_grad():
        ours.up.default.bias.add_(1)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(Words(9), str(tmp_path))
    found = dict(theirs.named_parameters())["base_model.model.up.base_layer.bias"]
    assert torch.equal(found, ours.up.default.bias)
    assert PeftConfig.from_pretrained(tmp_path).bias == bias


# tables


@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [1], "target_modules": ["q_proj"]}]
)
def test_a_table_with_an_adapter_is_not_exchanged(options: dict[str, Any]) -> None:
    model = get_peft_model(LLAMA.build(), LoraConfig(**options))
    table = model.get_input_embeddings()
    with pytest.raises(
        graphpeft.AdaptError, match="'default' is on embed_tokens in a LlamaModel, which would be exchanged"
    ):
        model.set_input_embeddings(nn.Embedding(20, 16))
    assert model.get_input_embeddings() is table
    model.set_input_embeddings(table)
    if "trainable_token_indices" not in options:
        model.set_output_embeddings(model.get_output_embeddings())
    base = model.unload()
    base.set_input_embeddings(nn.Embedding(20, 16))
    assert base.get_input_embeddings() is not table


def test_a_head_with_an_adapter_is_not_exchanged_and_other_layers_are() -> None:
    model = get_peft_model(LLAMA.build(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(
        graphpeft.AdaptError, match="'default' is on lm_head in a LlamaForCausalLM, which would be exchanged"
    ):
        model.set_output_embeddings(nn.Linear(16, 20))
    table = nn.Embedding(20, 16)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table


# names of tensors


def test_names_without_the_prefix_of_a_wrapper_are_those_of_an_injected_model() -> None:
    config = {"target_modules": ["up"], "init_lora_weights": False}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**config), Words(9))
    values = peft.get_peft_model_state_dict(theirs)
    assert not any(key.startswith("base_model.") for key in values)
    ours = graphpeft.inject_adapter_in_model(LoraConfig(**config), Words(9))
    ours.load_state_dict({k.replace("up.base_layer", "up"): v for k, v in theirs.state_dict().items()}, strict=False)
    graphpeft.set_peft_model_state_dict(ours, values)
    torch.testing.assert_close(ours(torch.tensor([[3]])), theirs(torch.tensor([[3]])))
    with pytest.raises(graphpeft.CheckpointError, match=r"lacks base_model\.model\.up\.lora_A"):
        graphpeft.set_peft_model_state_dict(ours, {"up.lora_B.weight": values["up.lora_B.weight"]})


# classes of models


@pytest.mark.parametrize("name", ["PeftModel", "PeftModelForCausalLM", "PeftMixedModel"])
def test_a_class_of_adapted_models_is_called_as_pefts(name: str) -> None:
    model, config = LLAMA.build(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    made = getattr(graphpeft, name)(model, config, "mine")
    assert made is model
    assert isinstance(made, getattr(graphpeft, name))
    assert made.active_adapters == ["mine"]
    assert copy.deepcopy(made).active_adapters == ["mine"]
    with pytest.raises(TypeError, match="pass the model first"):
        getattr(graphpeft, name)(config, model)
    with pytest.raises(TypeError, match="config"):
        getattr(graphpeft, name)(LLAMA.build())


# dropout, which other code finds as nn.Dropout

DROPPING: dict[str, tuple[Any, Any]] = {
    "LoRA": (lambda: nn.Linear(8, 8), LoraConfig(lora_dropout=0.5, init_lora_weights=False)),
    "LoRA of a convolution": (lambda: nn.Conv1d(2, 4, 1), LoraConfig(lora_dropout=0.5, init_lora_weights=False)),
    "DoRA": (lambda: nn.Linear(8, 8), LoraConfig(lora_dropout=0.5, use_dora=True, init_lora_weights=False)),
    "LoRA with a bias": (
        lambda: nn.Linear(8, 8),
        LoraConfig(lora_dropout=0.5, lora_bias=True, init_lora_weights=False),
    ),
    "AdaLoRA": (
        lambda: nn.Linear(8, 8),
        graphpeft.AdaLoraConfig(lora_dropout=0.5, total_step=9, init_lora_weights=False),
    ),
    "DeLoRA": (lambda: nn.Linear(8, 8), graphpeft.DeloraConfig(module_dropout=0.5, init_weights=False)),
    "GraLoRA": (
        lambda: nn.Linear(8, 8),
        graphpeft.GraloraConfig(gralora_dropout=0.5, gralora_k=2, init_weights=False),
    ),
}


def dropping(name: str) -> tuple[Any, Any]:
    """Returns a model in training whose adapter drops, and its input."""
    make, config = DROPPING[name]
    config = copy.deepcopy(config)
    config.target_modules = {"0"}
    torch.manual_seed(0)
    x = torch.randn(4, 2, 8)
    return get_peft_model(nn.Sequential(make()), config).train(), x


def dropouts(model: nn.Module) -> list[nn.Dropout]:
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_switched_off_as_trl_does(name: str) -> None:
    model, x = dropping(name)
    assert not torch.equal(model(x), model(x))
    for module in dropouts(model):
        module.p = 0
    assert torch.equal(model(x), model.eval()(x))


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_switched_on_alone_as_for_monte_carlo(name: str) -> None:
    model, x = dropping(name)
    assert torch.equal(model.eval()(x), model(x))
    for module in dropouts(model):
        module.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_goes_with_its_adapter(name: str) -> None:
    model, x = dropping(name)
    assert len(dropouts(model)) == 1
    copied = copy.deepcopy(model)
    for module in dropouts(copied):
        module.p = 0
    assert torch.equal(copied(x), copied(x))
    assert not torch.equal(model(x), model(x))
    model.delete_adapter("default")
    assert dropouts(model) == []


def test_rows_have_the_dropout_of_their_adapters() -> None:
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], lora_dropout=0.5, init_lora_weights=False), "a"
    )
    model.add_adapter("b", LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.train()
    first, second = (model(X.repeat(2, 1), adapter_names=["a", "b", "a", "b"]) for _ in range(2))
    assert torch.equal(first[1::2], second[1::2])
    assert not torch.equal(first[0::2], second[0::2])
    for switch_off in (lambda drop: drop.eval(), lambda drop: setattr(drop.train(), "p", 0)):
        for module in dropouts(model):
            switch_off(module)
        first, second = (model(X.repeat(2, 1), adapter_names=["a", "b", "a", "b"]) for _ in range(2))
        assert torch.equal(first, second)
    model.eval()
    for module in dropouts(model):
        module.train().p = 0.5
    first, second = (model(X.repeat(2, 1), adapter_names=["a", "b", "a", "b"]) for _ in range(2))
    assert torch.equal(first[1::2], second[1::2])
    assert not torch.equal(first[0::2], second[0::2])


def test_another_module_in_the_place_of_an_adapters_dropout_is_refused() -> None:
    model, x = dropping("LoRA")
    with pytest.raises(
        graphpeft.AdaptError, match=r"lora_dropout of an adapter is an nn\.Dropout, and is to be a Identity"
    ):
        model[0].default.lora_dropout = nn.Identity()
    model[0].default.lora_dropout = nn.Dropout(0.0)
    assert torch.equal(model(x), model(x))
