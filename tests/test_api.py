"""The methods that an adapted model gains mean what PEFT's and Transformers' of the same names mean."""

from __future__ import annotations

import copy
import inspect
import operator
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from models import LLAMA, MLP, output
from torch import nn

import graphpeft
from graphpeft import (
    AdaptError,
    CheckpointError,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
    trace,
)

pytestmark = pytest.mark.quick("model", "files")


def adapted(name: str = "default") -> Any:
    """Returns an adapted model whose adapter matters."""
    return get_peft_model(MLP.build(), MLP.config(init_lora_weights=False), name)


def test_disabled_adapters_rest_until_they_are_enabled():
    model = get_peft_model(LLAMA.build(), LLAMA.config(init_lora_weights=False))
    inputs = LLAMA.inputs()
    base, acting = output(LLAMA.build(), inputs), output(model, inputs)
    model.disable_adapters()
    model.disable_adapters()
    assert torch.equal(output(model, inputs), base)
    model.enable_adapters()
    assert torch.equal(output(model, inputs), acting)
    model.enable_adapters()
    assert model.active_adapters == ["default"]


def test_a_deleted_adapter_is_gone_and_the_others_act_on():
    model, inputs = adapted(), MLP.inputs()
    alone = output(model, inputs)
    model.add_adapter("other", MLP.config(init_lora_weights=False))
    model.set_adapter(["default", "other"])
    assert not torch.equal(output(model, inputs), alone)
    model.delete_adapter("other")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert torch.equal(output(model, inputs), alone)
    assert not any("other" in name for name, _ in model.named_parameters())
    with pytest.raises(AdaptError, match="Adapter other does not exist; the model has \\['default'\\]"):
        model.delete_adapter("other")


def test_the_base_model_is_the_model_itself():
    model = adapted()
    assert model.get_base_model() is model


def test_a_safe_merge_refuses_what_is_not_finite():
    model = adapted()
    with torch.no_grad():
        model.head.default.lora_B[0, 0] = torch.nan
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(AdaptError, match=r"head\.weight with 'default' merged into it isn't finite"):
        model.merge_and_unload(safe_merge=True)
    assert isinstance(model, PeftModel)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if "lora" not in name)


def test_a_pickle_is_written_if_asked_for_and_read_where_there_is_no_other(tmp_path: Path):
    model = adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.bin"]
    assert torch.equal(PeftModel.from_pretrained(MLP.build(), tmp_path)(*MLP.inputs()), model(*MLP.inputs()))
    theirs, ours = peft.load_peft_weights(str(tmp_path)), graphpeft.get_peft_model_state_dict(model)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_pickle_beside_safetensors_would_not_be_read_and_is_not_written(tmp_path: Path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"safetensors would be loaded in place of the adapter_model\.bin"):
        adapted().save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.bin").exists()


def test_an_option_that_does_not_exist_is_an_error(tmp_path: Path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="torch_dvice: not an option here"):
        PeftModel.from_pretrained(MLP.build(), tmp_path, torch_dvice="cpu")
    with pytest.raises(TypeError, match="torch_dvice: not an option here"):
        adapted().load_adapter(tmp_path, "other", torch_dvice="cpu")
    with pytest.raises(TypeError, match="mixd"):
        get_peft_model(MLP.build(), MLP.config(), mixd=False)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="LoraConfig has no option 'lora_alfa'; did you mean 'lora_alpha'"):
        LoraConfig(lora_alfa=8)  # type: ignore[call-arg]


def test_an_adapter_is_found_in_a_subfolder(tmp_path: Path):
    model = adapted("mine")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP.build(), tmp_path, subfolder="mine")
    assert torch.equal(output(loaded, MLP.inputs()), output(model, MLP.inputs()))


def test_tensors_that_are_set_are_reported_as_load_state_dict_does():
    model, other = adapted(), adapted()
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    assert torch.equal(output(other, MLP.inputs()), output(model, MLP.inputs()))


def test_a_report_is_that_of_the_active_adapter():
    model = adapted("mine")
    model.add_adapter("other", LoraConfig(target_modules=["head"]))
    assert model.adapter_report().adapter == "mine"
    assert model.adapter_report("other").adapter == "other"
    model.set_adapter("other")
    assert [row.site.name for row in model.adapter_report().adapted] == ["head"]
    model.set_adapter([])
    with pytest.raises(AdaptError, match=r"no adapter is active; name one of \['mine', 'other'\]"):
        model.adapter_report()


def test_the_active_adapter_is_what_activates_it_again():
    model = adapted("mine")
    model.add_adapter("other", LoraConfig(target_modules=["head"]))
    for active in ("mine", ["mine", "other"], []):
        model.set_adapter(active)
        assert model.active_adapter == active


def test_the_active_config_is_that_of_the_active_adapter():
    model = adapted("mine")
    model.add_adapter("other", LoraConfig(target_modules=["head"]))
    assert model.active_peft_config is model.peft_config["mine"]
    model.set_adapter("other")
    assert model.active_peft_config is model.peft_config["other"]


def test_a_name_with_spaces_and_signs_works_like_any_other(tmp_path: Path):
    model, plain, inputs = adapted("my  first-adapter_1"), adapted(), MLP.inputs()
    assert torch.equal(output(model, inputs), output(plain, inputs))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP.build(), tmp_path / "my  first-adapter_1", "an other")
    assert torch.equal(output(loaded, inputs), output(plain, inputs))
    traced = get_peft_model(trace(MLP.build(), inputs), MLP.config(init_lora_weights=False), "an other")
    traced.train()
    assert output(traced, inputs).shape == output(plain, inputs).shape
    traced.merge_and_unload()


# what PEFT's functions take


@pytest.mark.parametrize("function", ["get_peft_model", "PeftModel.from_pretrained"])
def test_arguments_by_position_are_in_the_order_of_peft(function: str):
    ours, theirs = (
        inspect.signature(operator.attrgetter(function)(package)).parameters for package in (graphpeft, peft)
    )
    by_position = [
        [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        for parameters in (ours, theirs)
    ]
    assert by_position[0] == by_position[1]
    assert [ours[name].default for name in by_position[0]] == [theirs[name].default for name in by_position[1]]


@pytest.mark.parametrize("method", ["add_adapter", "load_adapter", "set_adapter", "save_pretrained"])
def test_methods_take_what_pefts_take_in_the_same_order(method: str):
    ours, theirs = (inspect.signature(getattr(package.PeftModel, method)).parameters for package in (graphpeft, peft))
    named = [name for name, parameter in ours.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert named == list(theirs)[: len(named)]
    assert [ours[name].default for name in named] == [theirs[name].default for name in named]


def test_a_call_as_peft_has_it_adapts():
    inputs = MLP.inputs()
    model = get_peft_model(MLP.build(), MLP.config(init_lora_weights=False), "default", False, True, None, False)
    assert torch.equal(output(model, inputs), output(adapted(), inputs))
    model.add_adapter("other", MLP.config(), True, True)


def test_every_model_can_be_a_mixed_one():
    model = get_peft_model(MLP.build(), MLP.config(), mixed=True)
    assert isinstance(model, graphpeft.PeftMixedModel)


def test_the_revision_is_recorded_as_in_peft(tmp_path: Path):
    config = LoraConfig(target_modules=["up"])
    get_peft_model(MLP.build(), config, revision="v1").save_pretrained(tmp_path / "ours")
    assert config.revision is None
    peft.get_peft_model(MLP.build(), peft.LoraConfig(target_modules=["up"]), revision="v1").save_pretrained(
        str(tmp_path / "theirs")
    )
    revisions = [peft.LoraConfig.from_pretrained(str(tmp_path / of)).revision for of in ("ours", "theirs")]
    assert revisions == ["v1", "v1"]
    with pytest.warns(UserWarning, match="revision 'v1' is replaced by 'v2'"):
        model = get_peft_model(MLP.build(), LoraConfig(target_modules=["up"], revision="v1"), revision="v2")
    assert model.active_peft_config.revision == "v2"


def trained(model: Any, adapter: str) -> bool:
    """Returns whether the tensors of an adapter, all or none, require grad."""
    [answer] = {p.requires_grad for name, p in model.named_parameters() if "lora_" in name and adapter in name}
    return answer


def test_what_is_trained_after_set_adapter_is_what_peft_trains(tmp_path: Path):
    get_peft_model(LLAMA.build(), LLAMA.config()).save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(LLAMA.build(), tmp_path, "one")
    theirs = peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path), "one")

    def both() -> list[bool]:
        of_ours, of_theirs = ([trained(model, name) for name in model.peft_config] for model in (ours, theirs))
        assert of_ours == of_theirs
        return of_ours

    assert both() == [False]
    for model in (ours, theirs):
        model.load_adapter(tmp_path, "two")
    assert both() == [False, False]
    for model in (ours, theirs):
        model.set_adapter("two", inference_mode=True)
    assert both() == [False, False]
    assert ours.active_adapters == theirs.active_adapters == ["two"]
    for model in (ours, theirs):
        model.set_adapter("one")
    assert both() == [True, False]
    for model in (ours, theirs):
        model.set_adapter("two", True)
    assert both() == [False, False]


def test_an_adapter_for_inference_stays_so_when_others_come_and_go():
    model = adapted()
    model.set_adapter("default", inference_mode=True)
    model.add_adapter("other", MLP.config())
    model.disable_adapters()
    model.enable_adapters()
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert not trained(model, "default")
    model.set_adapter("default")
    assert trained(model, "default")


def test_adapters_that_rest_are_enabled_again_after_another_was_added():
    model = adapted()
    model.disable_adapters()
    model.add_adapter("other", MLP.config())
    base = output(MLP.build(), MLP.inputs())
    assert torch.equal(output(model, MLP.inputs()), base)
    model.enable_adapters()
    assert model.active_adapters == ["default"]
    assert not torch.equal(output(model, MLP.inputs()), base)


def test_adapters_that_are_set_while_all_are_disabled_act_afterwards():
    model = adapted()
    model.add_adapter("other", MLP.config(init_lora_weights=False))
    base, first = output(MLP.build(), MLP.inputs()), output(model, MLP.inputs())
    with model.disable_adapter():
        model.set_adapter("other")
        assert torch.equal(output(model, MLP.inputs()), base)
    assert trained(model, "other")
    assert not trained(model, "default")
    assert not torch.equal(output(model, MLP.inputs()), first)
    with model.disable_adapter():
        with pytest.warns(UserWarning, match="'other' was active and is deleted; 'default' is active now"):
            model.delete_adapter("other")
        assert torch.equal(output(model, MLP.inputs()), base)
    assert model.active_adapters == ["default"]
    assert trained(model, "default")
    assert torch.equal(output(model, MLP.inputs()), first)


def test_a_model_without_embeddings_has_none_to_save(tmp_path: Path):
    model = adapted()
    for accepted in ("auto", False):
        model.save_pretrained(tmp_path, save_embedding_layers=accepted)
    with pytest.raises(
        ValueError, match=r"save_embedding_layers=True, but a \w+ has no get_input_embeddings.*modules_to_save"
    ):
        model.save_pretrained(tmp_path / "none", save_embedding_layers=True)
    assert not (tmp_path / "none").exists()


def test_a_tensor_goes_to_its_weights_device_whichever_is_named(tmp_path: Path):
    model = adapted()
    model.save_pretrained(tmp_path)
    for device in ("cpu", torch.device("cuda:7"), None):
        loaded = PeftModel.from_pretrained(MLP.build(), tmp_path, torch_device=device)
        loaded.load_adapter(tmp_path, "other", False, device)
        assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
        assert torch.equal(output(loaded, MLP.inputs()), output(model, MLP.inputs()))


def test_options_of_loading_that_are_not_there_must_be_false(tmp_path: Path):
    option = "ephemeral_gpu_offload"
    adapted().save_pretrained(tmp_path)
    default: dict[str, Any] = {option: False}
    other: dict[str, Any] = {option: True}
    model = PeftModel.from_pretrained(MLP.build(), tmp_path, **default)
    for load in (
        lambda: PeftModel.from_pretrained(MLP.build(), tmp_path, **other),
        lambda: model.load_adapter(tmp_path, "other", **other),
    ):
        with pytest.raises(ValueError, match=f"{option}=True isn't supported: .* leave"):
            load()


def test_loading_an_adapter_tells_that_all_keys_were_found(tmp_path: Path):
    model = adapted()
    model.save_pretrained(tmp_path)
    result = model.load_adapter(tmp_path, "other")
    assert result.missing_keys == result.unexpected_keys == []


class Inside(nn.Module):
    """A model whose modules are inside another module than they are in the file."""

    _checkpoint_conversion_mapping: ClassVar = {"^": "body."}

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.parametrize(
    "mapping",
    [
        {"^": "body."},
        {"nothing": "something", r"^(\d)": r"body.\1", "body": "is not looked for in what was replaced"},
        None,
    ],
)
def test_names_in_a_file_are_mapped_as_in_peft(mapping: dict[str, str] | None, tmp_path: Path):
    base = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(Inside(copy.deepcopy(base)), tmp_path, key_mapping=mapping)
    theirs = peft.PeftModel.from_pretrained(Inside(copy.deepcopy(base)), str(tmp_path), key_mapping=mapping)
    x = torch.randn(2, 8)
    assert torch.equal(ours(x), model(x))
    torch.testing.assert_close(theirs(x), model(x))
    with pytest.raises(CheckpointError, match="key_mapping"):
        ours.load_adapter(tmp_path, "other")
    ours.load_adapter(tmp_path, "other", key_mapping={"^": "body."})


def test_a_mapping_of_names_is_of_regular_expressions(tmp_path: Path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'\(' in key_mapping is not a regular expression"):
        PeftModel.from_pretrained(MLP.build(), tmp_path, key_mapping={"(": ""})


def test_an_unloaded_model_trains_what_it_trained_before() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"])).unload()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
