"""PEFT's names exist here, or say what to use in their place; PEFT tells what they mean."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from models import CLASSIFIER, LLAMA, MLP, output
from torch import nn
from transformers import BertConfig, BertModel

import graphpeft
from graphpeft import AdaptError, LoraConfig, PeftConfig, PromptTuningConfig, TaskType, get_peft_model
from graphpeft.absent_names import ABSENT

ROOT = Path(__file__).parents[1]


def both(**options: Any) -> tuple[Any, Any]:
    """Returns equal models that this library and PEFT have adapted."""
    models = []
    for library in (graphpeft, peft):
        torch.manual_seed(0)
        model = library.get_peft_model(MLP.build(), library.LoraConfig(target_modules=["up", "down"], **options))
        models.append(model)
    return models[0], models[1]


# the package


def test_each_name_of_peft_exists_or_has_a_reason() -> None:
    assert set(peft.__all__) - set(graphpeft.__all__) == set(ABSENT)


@pytest.mark.quick("absent_names")
def test_a_name_that_does_not_exist_says_what_to_use() -> None:
    with pytest.raises(AttributeError, match=r"graphpeft has no LoraModel, unlike PEFT: a model isn't wrapped"):
        graphpeft.LoraModel  # noqa: B018
    with pytest.raises(AttributeError, match=r"graphpeft has no lora$"):
        graphpeft.lora  # noqa: B018


def test_the_page_of_names_is_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("peft_names", ROOT / "evidence" / "peft_names.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page()


def test_no_row_of_the_page_is_without_an_answer() -> None:
    rows = [row for row in (ROOT / "docs" / "peft_names.md").read_text(encoding="utf-8").splitlines() if "` |" in row]
    assert len(rows) > 200
    assert [row for row in rows if row.endswith("|  |")] == []


@pytest.mark.quick("peft_errors")
def test_errors_and_warnings_have_pefts_bases() -> None:
    model = get_peft_model(MLP.build(), LoraConfig(target_modules=["up"]))
    with pytest.warns(graphpeft.PeftWarning, match="no adapter is merged"):
        model.unmerge_adapter()
    for error in (graphpeft.NoMatchingPeftModuleError, graphpeft.PeftError, ValueError):
        with pytest.raises(error, match="nothing in"):
            get_peft_model(MLP.build(), LoraConfig(target_modules=["elsewhere"]))


# configs


def test_a_config_is_made_by_its_method() -> None:
    any_lora: Any = LoraConfig
    assert PeftConfig.from_peft_type(peft_type="LORA", r=3) == LoraConfig(r=3)
    assert LoraConfig.from_peft_type(r=3) == LoraConfig(r=3)
    assert any_lora(peft_type="LORA", r=3) == LoraConfig(r=3)
    assert graphpeft.get_peft_config({"peft_type": "LORA", "r": 3}) == LoraConfig(r=3)
    with pytest.raises(ValueError, match=r"LoraConfig is of the method LORA; leave peft_type='IA3' out"):
        any_lora(peft_type="IA3")


def test_a_config_says_whether_it_is_of_a_prompt_method() -> None:
    assert PromptTuningConfig(num_virtual_tokens=2).is_prompt_learning
    assert not LoraConfig().is_prompt_learning
    assert not LoraConfig().is_adaption_prompt


def test_the_keys_of_a_file_are_read(tmp_path: Path) -> None:
    LoraConfig(r=3, lora_alpha=5).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    ours, theirs = LoraConfig.from_json_file(file), peft.LoraConfig.from_json_file(str(file))
    assert ours == theirs
    assert ours["lora_alpha"] == 5


# status


def test_the_status_of_layers_is_that_of_peft() -> None:
    ours, theirs = both(r=3, lora_alpha=5)
    for model, library in ((ours, graphpeft), (theirs, peft)):
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["up"]))
        model.load_state_dict(model.state_dict())
        model.merge_adapter(["default"])
    for mine, other in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        other.name = other.name.removeprefix("model.")
        assert vars(mine) == vars(other)


@pytest.mark.parametrize("disabled", [False, True])
def test_the_status_of_a_model_is_that_of_peft(disabled: bool) -> None:
    ours, theirs = both(r=3, lora_alpha=5)
    for model in (ours, theirs):
        if disabled:
            model.base_model.disable_adapter_layers()
    mine, other = vars(ours.get_model_status()), vars(theirs.get_model_status())
    if disabled:
        # PEFT freezes what is disabled
        other |= {"trainable_params": mine["trainable_params"], "requires_grad": {"default": True}}
    # a tuner is around PEFT's model
    assert mine.pop("adapter_model_type") == other["base_model_type"]
    assert other.pop("adapter_model_type") == "LoraModel"
    assert mine == other
    assert mine["enabled"] is not disabled


def test_a_status_says_what_is_trained() -> None:
    model = get_peft_model(MLP.build(), LoraConfig(target_modules=["up", "down"]))
    model.get_parameter("first.up.default.lora_A").requires_grad = False
    assert [layer.requires_grad["default"] for layer in model.get_layer_status()][:2] == ["irregular", True]
    assert model.get_model_status().requires_grad == {"default": "irregular"}


def test_a_model_without_adapters_has_no_status() -> None:
    for function in (graphpeft.get_layer_status, graphpeft.get_model_status):
        with pytest.raises(AdaptError, match="has no adapters"):
            function(MLP.build())


# names on models


def test_an_adapted_model_has_names_of_peft() -> None:
    ours, theirs = both(modules_to_save=["head"]) if hasattr(MLP.build(), "head") else both()
    assert ours.prefix == theirs.prefix == "lora_"
    assert ours.peft_type == theirs.peft_type == "LORA"
    assert ours.modules_to_save == theirs.modules_to_save
    assert ours.has_active_enabled_adapter
    with ours.disable_adapter():
        assert not ours.has_active_enabled_adapter
    assert ours.base_model_torch_dtype is theirs.base_model_torch_dtype is None


def test_a_prompt_method_has_no_prefix() -> None:
    model = get_peft_model(LLAMA.build(), PromptTuningConfig(num_virtual_tokens=2, task_type=TaskType.CAUSAL_LM))
    assert not hasattr(model, "prefix")


def test_a_model_keeps_what_it_has_under_names_of_peft() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model, self.model = nn.Linear(4, 4), nn.Linear(4, 4)
            self.prefix = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(self.base_model(x)) + self.prefix

        def modules_to_save(self) -> str:
            return "own"

    torch.manual_seed(0)
    model, x = Own(), torch.randn(2, 4)
    expected, base = model(x), model.base_model
    get_peft_model(model, LoraConfig(target_modules=["model"]))
    assert torch.equal(model(x), expected)
    assert model.base_model is base
    assert model.modules_to_save() == "own"
    assert isinstance(model.prefix, nn.Parameter)


@pytest.mark.parametrize("kind", ["own", "head", "body"])
def test_the_model_inside_of_peft_s_wrappers_is_the_model(kind: str) -> None:
    model: Any = {"own": MLP, "head": CLASSIFIER}[kind].build() if kind != "body" else bert()
    targets = ["up"] if kind == "own" else ["query"]
    body = getattr(model, "base_model", model)
    get_peft_model(model, LoraConfig(target_modules=targets))
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.base_model.model is copied
        assert isinstance(copied.base_model, type(body))
    assert model.base_model == body
    assert [name for name, _ in model.base_model.named_parameters()] == [name for name, _ in body.named_parameters()]
    model.unload()
    assert getattr(model, "base_model", model) is body
    assert not hasattr(body, "model")


def test_the_base_model_shows_the_head_and_the_prefix_as_peft_s_inner_wrapper_does() -> None:
    for library in (graphpeft, peft):
        model: Any = CLASSIFIER.build()
        head = model.classifier
        model = library.get_peft_model(model, library.LoraConfig(target_modules=["query"]))
        assert model.base_model.classifier is head
        assert model.base_model.prefix == "lora_"
        assert not hasattr(model.base_model, "nothing")


def test_what_peft_s_inner_wrapper_does_with_adapters_the_base_model_of_a_head_does() -> None:
    found = {}
    for library in (graphpeft, peft):
        torch.manual_seed(1)
        model: Any = CLASSIFIER.build()
        for rank, name in ((2, "default"), (3, "other")):
            config = library.LoraConfig(r=rank, target_modules=["query"], init_lora_weights=False)
            model = library.get_peft_model(model, config) if name == "default" else model
            if name != "default":
                model.add_adapter(name, config)
        model.eval().base_model.set_adapter(["default", "other"])
        assert model.base_model.active_adapters == model.active_adapters == ["default", "other"]
        assert list(model.base_model.peft_config) == ["default", "other"]
        outputs = [logits(model)]
        model.base_model.merge_adapter()
        outputs.append(logits(model))
        model.base_model.unmerge_adapter()
        model.base_model.delete_adapter("other")
        outputs.append(logits(model))
        model.base_model.disable_adapter_layers()
        outputs.append(logits(model))
        model.base_model.enable_adapter_layers()
        outputs.append(logits(model.base_model.merge_and_unload()))
        found[library] = torch.stack(outputs)
    torch.testing.assert_close(found[graphpeft], found[peft])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**CLASSIFIER.inputs()).logits


def bert() -> nn.Module:
    """Returns a body of Transformers, without a head."""
    config = BertConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return BertModel(config)


def test_bodies_of_transformers_find_their_parts_as_before() -> None:
    for model in (LLAMA.build(), CLASSIFIER.build(), bert()):
        found: Any = model
        before = found.get_decoder(), found.get_encoder(), found.get_input_embeddings()
        get_peft_model(model, LoraConfig(target_modules="all-linear"))
        for part, now in zip(
            before, (found.get_decoder(), found.get_encoder(), found.get_input_embeddings()), strict=True
        ):
            assert part is now


def test_gradients_are_switched_on_and_off() -> None:
    ours, theirs = both()
    for model, library in ((ours, graphpeft), (theirs, peft)):
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["up"]))
        model.set_requires_grad("other")
        model.set_requires_grad(["default"], requires_grad=False)
    counts = [model.get_nb_trainable_parameters()[0] for model in (ours, theirs)]
    assert counts[0] == counts[1] == sum(p.numel() for n, p in ours.named_parameters() if "other" in n)
    with pytest.raises(AdaptError, match="Adapter third does not exist"):
        ours.set_requires_grad("third")


def test_an_adapter_that_is_loaded_to_be_trained_requires_grad_before_it_is_active(tmp_path: Path) -> None:
    ours, theirs = both(r=3)
    ours.save_pretrained(tmp_path)
    for model in (ours, theirs):
        model.load_adapter(str(tmp_path), "trained", is_trainable=True)
        model.load_adapter(str(tmp_path), "frozen")
    for model in (ours, theirs):
        assert all(p.requires_grad for n, p in model.named_parameters() if ".trained" in n)
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".frozen" in n)


def test_configs_are_shown_as_they_are_and_changed_by_their_adapters() -> None:
    model = get_peft_model(MLP.build(), LoraConfig(target_modules=["up"]))
    configs = model.peft_config
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    assert list(configs) == ["default", "other"]
    model.delete_adapter("other")
    assert list(configs) == ["default"]
    configs["default"].inference_mode = True
    assert model.peft_config["default"].inference_mode
    with pytest.raises(TypeError, match=r"model\.add_adapter\('third', config\) adds one"):
        configs["third"] = LoraConfig()
    for remove in (lambda: configs.pop("default"), lambda: configs.__delitem__("default")):
        with pytest.raises(TypeError, match=r"call model\.delete_adapter\('default'\)"):
            remove()


def test_a_model_is_an_instance_of_the_class_for_its_task() -> None:
    model = get_peft_model(LLAMA.build(), LoraConfig(target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM))
    found = {name for name, cls in graphpeft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items() if isinstance(model, cls)}
    assert found == {"CAUSAL_LM"}
    assert isinstance(model, graphpeft.PeftModel)


def test_an_adapter_is_loaded_by_the_class_for_a_task(tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.build(), LoraConfig(target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM))
    model.save_pretrained(tmp_path)
    loaded = graphpeft.PeftModelForCausalLM.from_pretrained(LLAMA.build(), tmp_path, torch_dtype=torch.float32)
    assert torch.equal(output(loaded, LLAMA.inputs()), output(model, LLAMA.inputs()))


def test_an_adapter_is_loaded_again_whose_file_says_its_ranks_in_other_words(tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["0", "1"], "rank_pattern": {"1": 2}}
    base = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(init_lora_weights=False, **options))
    theirs.save_pretrained(str(tmp_path))
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    ours.save_pretrained(tmp_path / "ours")
    before = dict(ours.named_parameters())
    ours.load_adapter(tmp_path, "default")
    torch.testing.assert_close(output(ours, (torch.ones(2, 4),)), output(theirs, (torch.ones(2, 4),)))
    assert all(parameter is before[name] for name, parameter in ours.named_parameters())
    others: list[dict[str, Any]] = [{"rank_pattern": {"0": 2}}, {"lora_alpha": 7}, {"target_modules": ["1"]}]
    for other in others:
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options | other)).save_pretrained(
            str(tmp_path / "o")
        )
        with pytest.raises(AdaptError, match="with other options than those"):
            ours.load_adapter(tmp_path / "o", "default")


def test_a_forward_that_is_called_itself_takes_adapters_of_rows() -> None:
    model = get_peft_model(LLAMA.build(), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    names = ["default", "__base__"]
    rows = {"input_ids": torch.tensor([[1, 2, 3], [1, 2, 3]])}
    called = model(**rows, adapter_names=names).logits
    assert torch.equal(model.forward(**rows, adapter_names=names).logits, called)
    assert (called[0] - called[1]).abs().max() > 1e-3
    assert inspect.signature(model.forward) == inspect.signature(LLAMA.build().forward)


# functions


def test_modules_are_adapted_that_a_state_dict_names() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(MLP.build(), peft.LoraConfig(r=2, target_modules=["down"]))
    state = peft.get_peft_model_state_dict(model)
    adapted = graphpeft.inject_adapter_in_model(LoraConfig(r=2), MLP.build(), state_dict=state)
    assert {path.rpartition(".")[2] for path in adapted.targeted_module_names} == {"down"}
    assert graphpeft.get_peft_model_state_dict(adapted).keys() == state.keys()
    with pytest.raises(AdaptError, match=r"is of a model with .*elsewhere.*, which this one hasn't"):
        graphpeft.inject_adapter_in_model(LoraConfig(), MLP.build(), state_dict={"elsewhere.lora_A.weight": None})
    with pytest.raises(AdaptError, match=r"has no tensor of LORA"):
        graphpeft.inject_adapter_in_model(LoraConfig(), MLP.build(), state_dict={"down.weight": None})
    with pytest.raises(ValueError, match="PROMPT_TUNING adapts no modules"):
        graphpeft.inject_adapter_in_model(PromptTuningConfig(num_virtual_tokens=2), MLP.build())


def test_the_base_model_has_a_state_dict_of_its_own() -> None:
    model: Any = MLP.build()
    before = copy.deepcopy(model.state_dict())
    get_peft_model(model, LoraConfig(target_modules=["up"], init_lora_weights=False))
    model.merge_adapter()
    found = graphpeft.get_base_model_state_dict(model)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_a_quantised_base_model_has_its_own_codes_while_adapters_are_merged() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32).to("cpu"))
    before = copy.deepcopy(model.state_dict())
    get_peft_model(model, LoraConfig(r=2, lora_alpha=64, target_modules=["0"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="merged into the quantised weights"):
        model.merge_adapter()
    found = graphpeft.get_base_model_state_dict(model)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    with pytest.raises(AdaptError, match=r"default are merged into the weights, .* call unmerge_adapter\(\)"):
        graphpeft.set_base_model_state_dict(model, before)
    model.unmerge_adapter()
    with pytest.raises(AdaptError, match=r"0\.weight are in 4 bits, whose scales no state_dict can set"):
        graphpeft.set_base_model_state_dict(model, before)


def test_the_base_model_is_given_other_values_under_its_adapters() -> None:
    torch.manual_seed(0)
    x, first = torch.randn(3, 4), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    second = copy.deepcopy(first)
    ours = get_peft_model(first, LoraConfig(r=2, lora_alpha=6, target_modules=["1"]))
    theirs: Any = peft.get_peft_model(second, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["1"]))
    adapter = {name: torch.randn_like(value) for name, value in graphpeft.get_peft_model_state_dict(ours).items()}
    graphpeft.set_peft_model_state_dict(ours, adapter)
    peft.set_peft_model_state_dict(theirs, adapter)
    values = {name: torch.randn_like(value) for name, value in graphpeft.get_base_model_state_dict(ours).items()}
    assert values.keys() == peft.get_base_model_state_dict(theirs).keys()
    graphpeft.set_base_model_state_dict(ours, values)
    peft.set_base_model_state_dict(theirs, values)
    torch.testing.assert_close(output(ours, (x,)), output(theirs, (x,)))
    name, *others = values
    with pytest.raises(RuntimeError, match="Missing keys: " + re.escape(name)):
        graphpeft.set_base_model_state_dict(ours, {other: values[other] for other in others})
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError, match=re.escape(others[-1]) + " in other shapes than the model"):
        graphpeft.set_base_model_state_dict(ours, values | {name: values[name] + 1, others[-1]: torch.ones(1)})
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    result = graphpeft.set_base_model_state_dict(ours, {name: values[name], "more": values[name]}, strict=False)
    assert result.unexpected_keys == ["more"]
    assert result.missing_keys == others


def test_the_tensors_of_a_file_are_read(tmp_path: Path) -> None:
    _, theirs = both(init_lora_weights=False)
    theirs.save_pretrained(str(tmp_path))
    ours, expected = graphpeft.load_peft_weights(tmp_path), peft.load_peft_weights(str(tmp_path))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_scales_are_multiplied_for_a_while() -> None:
    from peft.helpers import rescale_adapter_scale

    ours, theirs = both(r=3, lora_alpha=5, init_lora_weights=False)
    plain = output(ours, MLP.inputs())
    with graphpeft.rescale_adapter_scale(ours, 0.3), rescale_adapter_scale(theirs, 0.3):
        scaled = output(ours, MLP.inputs())
        torch.testing.assert_close(scaled, output(theirs, MLP.inputs()))
    assert (scaled - plain).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="interrupted"), graphpeft.rescale_adapter_scale(ours, 0.3):
        raise RuntimeError("interrupted")
    assert torch.equal(output(ours, MLP.inputs()), plain)
    ours.merge_adapter()
    with pytest.raises(AdaptError, match="their scales are in the weights"), graphpeft.rescale_adapter_scale(ours, 0.3):
        pass
