"""What can't be done is an error that says what, why, and what to do instead; the model stays as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import FUNCTIONAL, LLAMA, MLP, VIT, Example, llama_config, output
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import graphpeft
from graphpeft import (
    AdaptError,
    CheckpointError,
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
)

pytestmark = pytest.mark.quick("wording", "rules", "targeting")

# the model stays as it was


@dataclasses.dataclass(frozen=True)
class Same:
    """Equals only what is the very same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns all that can be seen of a model: classes, attributes, hooks, and tensors by identity and value."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[path] = (Same(module), Same(type(module)))
        for name, value in module.__dict__.items():
            if isinstance(value, dict):
                # parameters, buffers, submodules and hooks, in their order
                seen[f"{path}:{name}"] = (Same(value), [(key, Same(part)) for key, part in value.items()])
            elif isinstance(value, bool | int | float | str | None):
                seen[f"{path}:{name}"] = value
            else:
                seen[f"{path}:{name}"] = Same(value)
    for name, tensor in model.state_dict(keep_vars=True).items():
        seen[f"tensor {name}"] = (
            Same(tensor),
            tensor.requires_grad,
            Same(tensor.grad),
            tensor.detach().numpy().tobytes(),
        )
    return seen


@contextlib.contextmanager
def refused(model: nn.Module, error: type[Exception], *words: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Expects an error whose message has all of `words`, and a model that is as it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    for word in words:
        assert word in message
    assert snapshot(model) == before


def fresh() -> Any:
    return MLP.build()


def adapted() -> Any:
    return get_peft_model(MLP.build(), LoraConfig(target_modules=["up"], bias="all"), "first")


def traced() -> Any:
    return graphpeft.trace(MLP.build(), MLP.inputs())


def hooked() -> Any:
    model = MLP.build().train()
    model.get_submodule("first").register_forward_hook(lambda module, args, result: result)
    model.get_submodule("head").requires_grad_(False)
    return model


in_any_state = pytest.mark.parametrize("build", [fresh, adapted, traced, hooked])


def test_the_snapshot_sees_what_adapting_changes() -> None:
    model = MLP.build()
    before = snapshot(model)
    assert snapshot(model) == before
    get_peft_model(model, MLP.config())
    assert snapshot(model) != before


@in_any_state
def test_a_dry_run_changes_nothing(build: Callable[[], Any]) -> None:
    model = build()
    before = snapshot(model)
    with pytest.warns(UserWarning, match="'head' in target_modules"):
        report = graphpeft.explain(model, MLP.config(modules_to_save=["head"], bias="lora_only"), "second")
    assert "first.up" in str(report)
    assert snapshot(model) == before


# targets


@in_any_state
def test_targets_that_match_nothing_get_near_misses(build: Callable[[], Any]) -> None:
    model = build()
    with refused(model, AdaptError, "nothing in ", " matches ['hed', 'upp']; near misses: head, up"):
        get_peft_model(model, LoraConfig(target_modules=["upp", "hed"]), "second")


def test_a_tensor_that_a_parametrization_computes_is_named_with_its_original() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    original = "0.parametrizations.weight.original"
    with refused(model, AdaptError, f"a parametrization computes it, from {original}: name that, or the layer"):
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["0.weight"]))
    get_peft_model(model, LoraConfig(target_modules=[], target_parameters=[original]))


@in_any_state
@pytest.mark.parametrize("option", ["target_modules", "target_parameters"])
def test_a_dry_run_reports_that_nothing_matches(build: Callable[[], Any], option: str) -> None:
    model = build()
    before = snapshot(model)
    names: dict[str, Any] = {"target_modules": [], option: ["upp"]}
    report = graphpeft.explain(model, LoraConfig(**names), "second")
    assert report.adapted == []
    [refusal] = report.refused
    assert refusal.name == option
    assert "matches ['upp']; near misses: up" in refusal.reason
    assert refusal.reason in str(report)
    assert snapshot(model) == before


def test_a_long_list_of_refusals_is_cut() -> None:
    model = nn.Sequential(*(nn.LayerNorm(4) for _ in range(9)))
    with refused(model, AdaptError, "4.weight: ", "… and 4 more", "exclude_modules") as caught:
        get_peft_model(model, LoraConfig(target_modules=r"\d"))
    assert "5.weight: " not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "'v_porj' in target_modules (near misses: v_proj"),
        ({"exclude_modules": ["layers.0", "lm_haed"]}, "'lm_haed' in exclude_modules (near misses: lm_head)"),
        ({"rank_pattern": {"q_proj": 2, "v_porj": 3}}, "'v_porj' in rank_pattern (near misses: v_proj"),
        ({"alpha_pattern": {r".*\.1\..*q_proj": 2, r"7\..*": 3}}, r"'7\\..*' in alpha_pattern"),
        ({"rank_pattern": {"k_proj": 2}}, "'k_proj' in rank_pattern"),
        ({"target_parameters": ["norm.weigth"]}, "'norm.weigth' in target_parameters (near misses: norm.weight"),
        ({"target_modules": ["q_proj", *"abcdefg"]}, "'a', 'b', 'c', 'd', 'e', … and 2 more in target_modules"),
    ],
)
@pytest.mark.parametrize("adapt", [get_peft_model, graphpeft.explain])
def test_entries_without_effect_beside_good_ones_are_named_in_a_warning(
    adapt: Callable[..., Any], options: dict[str, Any], words: str
) -> None:
    names: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    config = LoraConfig(**names | options)
    with pytest.warns(UserWarning, match=re.escape(words)) as caught:
        adapt(LLAMA.build(), config)
    [warning] = caught
    assert "LlamaForCausalLM" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "self_attn.v_proj", "gate_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*nothing.*"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0], "rank_pattern": {r".*0.*": 2}},
    ],
)
def test_what_has_an_effect_or_wasnt_named_is_not_warned_of(options: dict[str, Any]) -> None:
    # a warning is an error in these tests; this model has one of the two heads of the task
    model = transformers.LlamaForSequenceClassification(llama_config())
    graphpeft.explain(model, LoraConfig(task_type=TaskType.SEQ_CLS, **options))


def test_a_file_that_fits_is_loaded_without_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="'for_another_model' in target_modules"):
        model = get_peft_model(fresh(), LoraConfig(target_modules=["up", "for_another_model"]))
    model.save_pretrained(tmp_path)
    assert "for_another_model" in (tmp_path / "adapter_config.json").read_text()
    PeftModel.from_pretrained(fresh(), tmp_path)


BARE = Example("bare", lambda: nn.Linear(3, 3), lambda generator: (torch.randn(2, 3, generator=generator),), {})


@pytest.mark.parametrize(
    ("example", "options", "words"),
    [
        (LLAMA, {"target_modules": ["q_porj"]}, ["q_porj", "q_proj"]),
        (LLAMA, {"target_modules": r".*\.q_porj"}, ["q_porj"]),
        (FUNCTIONAL, {"target_modules": ["one.ww"]}, ["one.ww", "one.w"]),
        (FUNCTIONAL, {"target_parameters": ["one.ww"]}, ["one.ww", "one.w"]),
        (LLAMA, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ["q_proj", "excluded"]),
        (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, ["q_proj", "excluded"]),
        (LLAMA, {"target_modules": ["q_proj"], "layers_to_transform": [7]}, ["q_proj", "layers_to_transform"]),
        (LLAMA, {"target_modules": "q_proj"}, ["a regular expression for a whole name", "write ['q_proj']"]),
        (LLAMA, {"target_modules": ["all-linear"]}, ["'all-linear' is written without a list"]),
        (BARE, {"target_modules": "all-linear"}, ["a layer by itself has no name", "nn.Sequential(layer)"]),
        (MLP, {}, ["target_modules", "up"]),
    ],
)
def test_what_matches_nothing_is_named(example: Example, options: dict[str, Any], words: list[str]) -> None:
    model = example.build()
    with refused(model, AdaptError, *words):
        get_peft_model(model, LoraConfig(**options))


def test_a_weight_is_adapted_once() -> None:
    model = LLAMA.build()
    with refused(model, AdaptError, "layers.0.self_attn.q_proj", "target_modules", "target_parameters"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=["q_proj.weight"]))


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    model = fresh()
    with refused(model, ValueError, "*up", "target_modules", "regular expression"):
        get_peft_model(model, LoraConfig(target_modules="*up"))


def test_a_container_is_no_target_but_what_is_inside() -> None:
    model = fresh()
    with refused(model, AdaptError, "blocks.0", "no parameter called weight", "blocks.0.up"):
        get_peft_model(model, LoraConfig(target_modules=["blocks.0"]))


@pytest.mark.parametrize(
    ("example", "target", "words"),
    [
        (VIT, "blocks.0.norm1", ["blocks.0.norm1", "its weight is no matrix", "exclude_modules"]),
        (LLAMA, "input_layernorm", ["model.layers.0.input_layernorm", "has the shape (32,)"]),
    ],
)
@pytest.mark.parametrize("is_traced", [False, True], ids=["as-it-is", "traced"])
def test_a_weight_that_no_rule_adapts_is_named(
    example: Example, target: str, words: list[str], is_traced: bool
) -> None:
    model = example.build()
    model = graphpeft.trace(model, example.inputs()) if is_traced else model
    targets = [*example.lora["target_modules"], target]
    with refused(model, AdaptError, *words):
        get_peft_model(model, LoraConfig(target_modules=targets))


def test_a_layer_that_has_not_seen_its_input_yet_is_refused_and_beside_others_left_alone() -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))

    with pytest.raises(AdaptError, match=r"can't adapt 1: its weight has no shape yet; run the model once"):
        get_peft_model(lazy(), LoraConfig(r=2, target_modules=["1"]))
    model = get_peft_model(lazy(), LoraConfig(r=2, target_modules=["0"]))
    model(torch.randn(2, 4))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "0.default.lora_A",
        "0.default.lora_B",
    }
    assert all(parameter.requires_grad for parameter in model.unload().parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_module_is_refused_wherever_it_is() -> None:
    scripted = torch.jit.script(nn.Linear(4, 3))
    inside = torch.jit.script(nn.Sequential(nn.Linear(4, 3)))
    beside = nn.Linear(4, 4)
    models = ((scripted, "0"), (nn.Sequential(beside, scripted), "1"), (nn.Sequential(beside, inside), "1.0"))
    for model, target in models:
        with pytest.raises(AdaptError, match=r"(the model|1) is a ScriptModule, which can't be changed"):
            get_peft_model(model, LoraConfig(r=2, target_modules=[target]))


def test_an_attribute_in_the_adapters_place_is_not_overwritten() -> None:
    model = fresh()
    model.get_submodule("head").register_parameter("default", nn.Parameter(torch.ones(1)))
    with refused(model, AdaptError, "head", "'default'", "adapter name"):
        get_peft_model(model, LoraConfig(target_modules=["up", "head"]))


# configs


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_is_a_positive_integer(rank: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"r must be a positive integer, not {rank!r}")):
        LoraConfig(r=rank, target_modules=["up"])
    with pytest.raises(ValueError, match=re.escape(f"rank_pattern['up'] must be a positive integer, not {rank!r}")):
        LoraConfig(target_modules=["up"], rank_pattern={"up": rank})


WRONG_TYPES = [
    ("r", 2.0, "int"),
    ("r", "8", "int"),
    ("r", None, "int"),
    ("r", True, "int"),
    ("lora_alpha", "x", "float"),
    ("lora_alpha", None, "float"),
    ("lora_alpha", True, "float"),
    ("lora_dropout", "x", "float"),
    ("lora_dropout", None, "float"),
    ("target_modules", 5, "list[str] | set[str] | str | None"),
    ("target_modules", ["up", 5], "list[str] | set[str] | str | None"),
    ("target_modules", {"up": 1}, "list[str] | set[str] | str | None"),
    ("exclude_modules", [["up"]], "list[str] | set[str] | str | None"),
    ("target_parameters", "one.w", "list[str] | None"),
    ("modules_to_save", 5, "list[str] | None"),
    ("modules_to_save", "head", "list[str] | None"),
    ("layers_to_transform", "x", "list[int] | int | None"),
    ("layers_to_transform", [0.5], "list[int] | int | None"),
    ("layers_pattern", 1, "list[str] | str | None"),
    ("rank_pattern", ["up"], "dict[str, int]"),
    ("rank_pattern", {"up": "8"}, "dict[str, int]"),
    ("rank_pattern", {"up": True}, "dict[str, int]"),
    ("alpha_pattern", {"up": None}, "dict[str, float]"),
    ("alpha_pattern", {"up": "x"}, "dict[str, float]"),
    ("bias", "some", "Literal['none', 'all', 'lora_only']"),
    ("bias", None, "Literal['none', 'all', 'lora_only']"),
    ("use_rslora", "yes", "bool"),
    ("init_lora_weights", None, "bool | str"),
    ("inference_mode", 1, "bool"),
    ("revision", 2, "str | None"),
    ("auto_mapping", "x", "dict[str, Any] | None"),
]


@pytest.mark.parametrize(("option", "value", "wanted"), WRONG_TYPES)
def test_a_value_of_another_type_is_named_with_what_is_wanted(option: str, value: Any, wanted: str) -> None:
    message = f"{option} must be {wanted}, not {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        LoraConfig(**{"target_modules": ["up"], option: value})
    config = LoraConfig(target_modules=["up"])
    setattr(config, option, value)
    model = fresh()
    with refused(model, AdaptError, message):
        get_peft_model(model, config)


@pytest.mark.parametrize(("option", "value", "wanted"), WRONG_TYPES)
def test_a_value_of_another_type_in_a_file_is_named_with_the_file(
    option: str, value: Any, wanted: str, tmp_path: Path
) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["up"], option: value}))
    model = fresh()
    with refused(model, ValueError, str(file), f"{option} must be {wanted}, not {value!r}"):
        PeftModel.from_pretrained(model, tmp_path)


def test_null_in_place_of_patterns_means_none_as_in_peft(tmp_path: Path) -> None:
    values = {"peft_type": "LORA", "rank_pattern": None, "alpha_pattern": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    for config in (LoraConfig.from_pretrained(tmp_path), LoraConfig(rank_pattern=None, alpha_pattern=None)):  # type: ignore[arg-type]
        assert config == LoraConfig()


@pytest.mark.parametrize("value", [["up"], ("up",), {"up"}, frozenset({"up"})])
def test_a_list_of_names_may_be_any_collection(value: Any) -> None:
    config = LoraConfig(target_modules=value, modules_to_save=value, target_parameters=value, lora_alpha=2)
    assert config.to_dict()["target_modules"] == config.to_dict()["modules_to_save"] == ["up"]


@in_any_state
@pytest.mark.parametrize(("rank", "wanted"), [(0, "a positive integer"), (-3, "a positive integer"), (2.5, "int")])
def test_a_bad_rank_is_refused_in_pefts_config_and_after_the_fact(
    build: Callable[[], Any], rank: Any, wanted: str
) -> None:
    model = build()
    theirs: Any = peft.LoraConfig(target_modules=["up"])
    theirs.r = rank
    with refused(model, ValueError, f"r must be {wanted}, not {rank!r}"):
        get_peft_model(model, theirs, "second")
    ours = LoraConfig(target_modules=["up"])
    ours.r = rank
    with refused(model, ValueError, f"r must be {wanted}, not {rank!r}"):
        get_peft_model(model, ours, "second")


@in_any_state
def test_a_config_of_a_method_that_isnt_there_is_refused(build: Callable[[], Any]) -> None:
    model = build()
    theirs: Any = peft.LoraConfig()
    theirs.peft_type = "FUTURE"
    with refused(model, ValueError, "FUTURE", "supported", "LORA"):
        get_peft_model(model, theirs, "second")


@pytest.mark.parametrize("config", [{"r": 8}, "lora", None, nn.Linear(1, 1)])
def test_what_is_no_config_is_refused(config: Any) -> None:
    model = fresh()
    with refused(model, TypeError, type(config).__name__, "LoraConfig"):
        get_peft_model(model, config)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_qalora", True),
        ("qalora_group_size", 32),
        ("megatron_config", {"a": 1}),
        ("megatron_core", "other.core"),
    ],
)
@pytest.mark.parametrize("build", [fresh, adapted])
def test_an_option_that_isnt_supported_is_never_ignored(build: Callable[[], Any], option: str, value: Any) -> None:
    model = build()
    with refused(model, AdaptError, option):
        get_peft_model(model, LoraConfig(target_modules=["up"], **{option: value}), "second")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("loftq_config", {"loftq_bits": 4}),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"corda_method": "ipm"}),
        ("lora_ga_config", {"direction": "ArB2r"}),
    ],
)
def test_options_of_another_initialisation_are_ignored_with_a_warning(option: str, value: Any) -> None:
    with pytest.warns(graphpeft.PeftWarning, match=f"{option} has no effect unless init_lora_weights is"):
        get_peft_model(fresh(), LoraConfig(target_modules=["up"], **{option: value}))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lora_alhpa": 3}, TypeError, "no option 'lora_alhpa'; did you mean 'lora_alpha'"),
        ({"target_module": ["up"]}, TypeError, "no option 'target_module'; did you mean 'target_modules'"),
        ({"xyzzy": 1}, TypeError, "no option 'xyzzy'"),
        ({"lora_dropout": 1.5}, ValueError, "lora_dropout"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout"),
        ({"task_type": "CAUSAL"}, ValueError, "task_type is 'CAUSAL'.*CAUSAL_LM"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, ValueError, "layers_to_transform"),
        ({"target_modules": ["up"], "layers_pattern": "layers"}, ValueError, "layers_pattern.*layers_to_transform"),
    ],
)
def test_a_config_says_what_is_wrong_with_it(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LoraConfig(**options)


# adapter names


def test_an_adapter_name_is_used_once(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    words = ("'first'", "already", "adapter_name")
    with refused(model, AdaptError, *words):
        get_peft_model(model, LoraConfig(target_modules=["head"]), "first")
    with refused(model, AdaptError, *words):
        model.add_adapter("first", LoraConfig(target_modules=["head"]))
    with refused(model, graphpeft.PeftWarning, "'first'", "already, which gets the saved values"):
        PeftModel.from_pretrained(model, tmp_path / "first", "first")  # a warning, which is an error in these tests


@in_any_state
@pytest.mark.parametrize(
    "name",
    [
        *["", "a.b", "..", "a/b", "/a", "a\\b", "C:a", " a", "a ", " ", "a\n", "a\0b", "a(1)", "a\u00a0b", "a\u200db"],
        *["a'b", 'a"b', 'x", None) or open("F","w") or getattr(self, "weight', "{a}", "a#", "a\u2014b", "x\u00b2"],
        *["__base__", "a" * 101, 5, None],
    ],
)  # fmt: skip
def test_an_adapter_name_consists_of_letters_digits_and_few_signs(build: Callable[[], Any], name: Any) -> None:
    model = build()
    with refused(model, AdaptError, repr(name), "can't be an adapter's name", "choose"):
        get_peft_model(model, MLP.config(), name)


@in_any_state
@pytest.mark.parametrize("name", ["e\u0301t", "\ufb01n", "\u00b5", "\uff21"])
def test_of_names_that_look_alike_one_spelling_is_taken(build: Callable[[], Any], name: str) -> None:
    model, usual = build(), unicodedata.normalize("NFKC", name)
    with refused(model, AdaptError, repr(name), repr(usual), "normalize"):
        get_peft_model(model, MLP.config(), name)
    get_peft_model(model, MLP.config(), usual)
    for use in (model.set_adapter, model.delete_adapter):
        with refused(model, AdaptError, f"{name!r}, which is another spelling of {usual!r}"):
            use(name)
    with refused(model, AdaptError, f"{name!r}, which is another spelling of {usual!r}"):
        model.mixed_batch([name])


@pytest.mark.parametrize("name", ["été", "\u03bc", "हिन्दी", "适配器", "_-9 a", "1", "x\u0302", "a" * 100])
def test_names_of_any_script_act_and_are_saved(name: str, tmp_path: Path) -> None:
    inputs = MLP.inputs()
    torch.manual_seed(1)
    expected = get_peft_model(MLP.build(), MLP.config(init_lora_weights=False))
    torch.manual_seed(1)
    model = get_peft_model(MLP.build(), MLP.config(init_lora_weights=False), name)
    assert torch.equal(output(model, inputs), output(expected, inputs))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP.build(), tmp_path / name, name)
    assert torch.equal(output(loaded, inputs), output(expected, inputs))


def test_a_name_is_refused_wherever_one_comes_in(tmp_path: Path) -> None:
    model, bad = adapted(), 'a"b'
    model.save_pretrained(tmp_path)
    config = LoraConfig(target_modules=["head"])
    for use in (
        lambda: graphpeft.explain(model, config, bad),
        lambda: model.add_adapter(bad, config),
        lambda: model.load_adapter(tmp_path / "first", bad),
        lambda: PeftModel.from_pretrained(model, tmp_path / "first", bad),
        lambda: model.add_weighted_adapter(["first"], [1.0], bad, "linear"),
    ):
        with refused(model, AdaptError, repr(bad), "can't be an adapter's name"):
            use()


def test_an_adapter_that_isnt_there_is_named() -> None:
    model = adapted()
    for use in (
        lambda: model.set_adapter("second"),
        lambda: model.set_adapter(["first", "second"]),
        lambda: model.merge_and_unload(adapter_names=["second"]),
        lambda: model.save_pretrained("/nowhere", selected_adapters=["second"]),
        lambda: model.delete_adapter("second"),
        lambda: graphpeft.get_peft_model_state_dict(model, adapter_name="second"),
        lambda: graphpeft.set_peft_model_state_dict(model, {}, "second"),
    ):
        with refused(model, AdaptError, "Adapter second does not exist", "first"):
            use()


def test_a_model_without_adapters_says_so() -> None:
    model = fresh()
    with refused(model, AdaptError, "Mlp", "no adapters", "get_peft_model"):
        graphpeft.get_peft_model_state_dict(model)


def test_two_adapters_dont_fully_train_one_module_at_the_same_time() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(target_modules=["down"], modules_to_save=["head"]))
    with refused(model, AdaptError, "'first'", "'second'", "head", "fully"):
        model.set_adapter(["first", "second"])


# files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with an adapter for `MLP`."""
    model = get_peft_model(MLP.build(), LoraConfig(target_modules=["up", "down"], modules_to_save=["head"]))
    model.save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused_file(build: Callable[[], Any], folder: Path, error: type[Exception], *words: str) -> None:
    model = build()
    with refused(model, error, *words):
        PeftModel.from_pretrained(model, folder, "second")


@in_any_state
@pytest.mark.parametrize("kept", [0, 4, 20, -1], ids=["empty", "no-header", "half-a-header", "a-byte-short"])
def test_a_truncated_file_is_damaged(build: Callable[[], Any], kept: int, saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused_file(build, saved, CheckpointError, "adapter_model.safetensors", "damaged")


A_KEY = "base_model.model.first.up.lora_A.weight"


@in_any_state
def test_a_tensor_of_another_shape_is_named_with_both_shapes(build: Callable[[], Any], saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({A_KEY: torch.zeros(3, 8)}))
    refused_file(build, saved, CheckpointError, A_KEY, "(3, 8)", "(8, 8)")


def test_a_head_of_another_size_is_named_with_both_shapes(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({"base_model.model.head.weight": torch.zeros(7, 8)}))
    refused_file(fresh, saved, CheckpointError, "base_model.model.head.weight", "(7, 8)", "(5, 8)")


@in_any_state
@pytest.mark.parametrize("key", [A_KEY, "base_model.model.head.bias"])
def test_a_tensor_that_lacks_is_named(build: Callable[[], Any], key: str, saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.pop(key))
    refused_file(build, saved, CheckpointError, "lacks", key)


@in_any_state
def test_a_tensor_too_many_is_named(build: Callable[[], Any], saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({"base_model.model.tail.lora_A.weight": torch.zeros(8, 8)}))
    refused_file(build, saved, CheckpointError, "base_model.model.tail.lora_A.weight", "no place")


def test_all_that_is_wrong_with_a_file_is_said_at_once(saved: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[A_KEY]
        tensors["extra"] = torch.zeros(1)
        tensors["base_model.model.head.bias"] = torch.zeros(3)

    edit_tensors(saved, edit)
    refused_file(fresh, saved, CheckpointError, A_KEY, "extra", "base_model.model.head.bias")


def test_what_is_wrong_with_a_file_is_cut_where_it_is_much() -> None:
    model = get_peft_model(LLAMA.build(), LoraConfig(target_modules="all-linear"))
    tensors = graphpeft.get_peft_model_state_dict(model)
    wrong = {key.replace("_proj", ".proj") if "mlp" in key else key: tensor for key, tensor in tensors.items()}
    wrong |= {key: torch.zeros(1) for key in tensors if "self_attn" in key}
    assert len([key for key in tensors if "mlp" in key]) == 12
    assert len([key for key in tensors if "self_attn" in key]) == 16
    with refused(
        model, CheckpointError, "lacks ", "no place for", "of shape (1,)", "and 7 more", "and 11 more"
    ) as caught:
        graphpeft.set_peft_model_state_dict(model, wrong)
    assert str(caught.value).count("base_model.model.") == 15
    assert "key_mapping" in str(caught.value)


def test_a_gathered_state_dict_that_lacks_the_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted()
    with refused(model, CheckpointError, "lacks first.up.first.lora_A", "the whole adapted model"):
        model.save_pretrained(tmp_path, state_dict=MLP.build().state_dict())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_file_for_targets_that_are_refused_says_why_they_are(saved: Path) -> None:
    edit_config(saved, target_modules=["up", "blocks.0"])
    refused_file(fresh, saved, AdaptError, "blocks.0", "no parameter called weight")


def test_another_model_is_refused(saved: Path) -> None:
    refused_file(LLAMA.build, saved, AdaptError, "LlamaForCausalLM", "up")


def test_a_bad_state_dict_overwrites_nothing() -> None:
    model = adapted()
    tensors = graphpeft.get_peft_model_state_dict(model, adapter_name="first")
    changed = {key: tensor + 1 for key, tensor in tensors.items()}
    *_, last = changed
    for wrong, word in (
        ({**changed, last: torch.zeros(2, 2)}, "(2, 2)"),
        ({key: tensor for key, tensor in changed.items() if key != last}, "lacks"),
        ({**changed, "extra": torch.zeros(1)}, "extra"),
    ):
        with refused(model, CheckpointError, word):
            graphpeft.set_peft_model_state_dict(model, wrong, "first")


@in_any_state
@pytest.mark.parametrize("text", ["", "{", "r = 8", '{"r": 8,}'])
def test_a_config_that_is_no_json_is_named(build: Callable[[], Any], text: str, saved: Path) -> None:
    (saved / "adapter_config.json").write_text(text)
    refused_file(build, saved, ValueError, "adapter_config.json", "JSON")


def test_a_config_that_is_no_object_is_named(saved: Path) -> None:
    (saved / "adapter_config.json").write_text("[1, 2]")
    refused_file(fresh, saved, ValueError, "adapter_config.json", "list")


def test_a_config_that_is_no_text_is_named(saved: Path) -> None:
    (saved / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    refused_file(fresh, saved, ValueError, "adapter_config.json", "JSON")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 0}, ["r must be a positive integer"]),
        ({"r": 2.5}, ["r must be int, not 2.5"]),
        ({"peft_type": "FUTURE"}, ["'FUTURE'", "LORA"]),
        ({"peft_type": None}, ["peft_type", "LORA"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"target_modules": ["upp"]}, ["upp", "near misses"]),
    ],
)
@pytest.mark.parametrize("build", [fresh, adapted])
def test_a_config_file_is_checked_as_a_config_is(
    build: Callable[[], Any], values: dict[str, Any], words: list[str], saved: Path
) -> None:
    edit_config(saved, **values)
    refused_file(build, saved, ValueError, *words)


def test_an_unknown_key_in_a_file_is_dropped_with_a_warning(saved: Path) -> None:
    edit_config(saved, lora_alhpa=3)
    model = fresh()
    with pytest.warns(
        UserWarning,
        match=r"keys that LoraConfig doesn't know, and which are left out: 'lora_alhpa'. Did you mean 'lora_alpha'",
    ):
        PeftModel.from_pretrained(model, saved)
    assert model.get_submodule("first.up").default.lora_scaling == 1


def test_a_config_of_another_method_is_read_only_as_such(saved: Path) -> None:
    edit_config(saved, peft_type="FUTURE")
    with pytest.raises(ValueError, match="FUTURE"):
        LoraConfig.from_pretrained(saved)
    with pytest.raises(ValueError, match="FUTURE"):
        PeftConfig.from_pretrained(saved)


@in_any_state
def test_a_path_that_doesnt_exist_is_named(build: Callable[[], Any], tmp_path: Path) -> None:
    refused_file(build, tmp_path / "nowhere", FileNotFoundError, str(tmp_path / "nowhere"), "folder")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_one_of_the_files_is_named(file: str, saved: Path) -> None:
    (saved / file).unlink()
    refused_file(fresh, saved, FileNotFoundError, str(saved), file)


def test_a_folder_of_named_adapters_lists_them(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(target_modules=["head"]))
    model.save_pretrained(tmp_path)
    refused_file(fresh, tmp_path, FileNotFoundError, str(tmp_path), "first, second", "subfolder='first'")
    PeftModel.from_pretrained(fresh(), tmp_path, subfolder="first")


# pickles


def pickled(folder: Path, content: Any = None) -> None:
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file) if content is None else content, folder / "adapter_model.bin")
    file.unlink()


def test_a_pickle_is_read_where_nothing_else_is_asked_for(saved: Path) -> None:
    pickled(saved)
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin, which use_safetensors=None or False reads"):
        PeftModel.from_pretrained(fresh(), saved, use_safetensors=True)
    model = PeftModel.from_pretrained(fresh(), saved)
    tensors = graphpeft.get_peft_model_state_dict(model)
    expected = torch.load(saved / "adapter_model.bin", weights_only=True)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())


class Malice:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_runs_no_code(saved: Path) -> None:
    pickled(saved, {A_KEY: Malice(saved / "pwned")})
    model = fresh()
    with refused(model, CheckpointError, "adapter_model.bin"):
        PeftModel.from_pretrained(model, saved, use_safetensors=False)
    assert not (saved / "pwned").exists()


def test_a_damaged_pickle_is_named(saved: Path) -> None:
    pickled(saved)
    file = saved / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:100])
    model = fresh()
    with refused(model, CheckpointError, "adapter_model.bin"):
        PeftModel.from_pretrained(model, saved, use_safetensors=False)


class _AtTwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.out = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.out(self.second(self.first(x)))


def test_a_module_at_two_paths_is_named_by_the_first_one_and_other_names_get_a_warning() -> None:
    with pytest.raises(
        NoMatchingPeftModuleError, match=r"nothing in _AtTwoPaths matches \['second'\].* has first, out"
    ):
        get_peft_model(_AtTwoPaths(), LoraConfig(target_modules=["second"]))
    with pytest.warns(
        graphpeft.PeftWarning, match="names what has no effect on _AtTwoPaths: 'second' in target_modules"
    ):
        get_peft_model(_AtTwoPaths(), LoraConfig(target_modules=["second", "out"]))
    model: Any = get_peft_model(_AtTwoPaths(), LoraConfig(target_modules=["first"], init_lora_weights=False))
    x = torch.randn(3, 4)
    found = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), found, rtol=1e-4, atol=1e-5)


class _OwnWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Any) -> Any:
        return x @ self.w


@pytest.mark.parametrize("name", ["model", "modules_to_save", "prefix", "base_model", "save_pretrained"])
def test_an_adapter_of_the_models_own_weight_has_no_name_of_an_adapted_models_attribute(name: str) -> None:
    config, match = LoraConfig(target_modules=["w"]), f"attribute '{name}' already; choose another adapter name"
    base = _OwnWeight()
    with refused(base, AdaptError, match):
        get_peft_model(base, config, name)
    model: Any = get_peft_model(base, config)
    with refused(model, AdaptError, match):
        model.add_adapter(name, config)
    inside: Any = get_peft_model(nn.Sequential(_OwnWeight()), config, name)
    inside.add_adapter(f"{name}_", config)
