"""Which modules and parameters a config names: the rules as examples, then as equality with PEFT on generated cases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners import tuners_utils
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGET_MODULES
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

import graphpeft
from graphpeft import trace
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.rules.options import TargetOptions
from graphpeft.targeting.pattern_values import pattern_value
from graphpeft.targeting.targets import (
    Match,
    all_linear_names,
    compile_matcher,
    default_target_modules,
    is_all_linear,
    match,
    match_parameter,
    near_misses,
    output_head,
)

pytestmark = pytest.mark.quick("targeting")

OF_MODULES = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
Q_PROJ = "model.layers.3.self_attn.q_proj"


def config(**fields: Any) -> TargetOptions:
    """What a config with these options names; all others are missing, as they are in the configs of some methods."""
    return TargetOptions(**fields)


# target_modules


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], Match.YES),
        (["self_attn.q_proj"], Match.YES),
        ([Q_PROJ], Match.YES),
        (["k_proj", "q_proj"], Match.YES),
        (("q_proj",), Match.YES),
        ({"q_proj"}, Match.YES),
        (["proj"], Match.NO),
        (["attn.q_proj"], Match.NO),
        (["self_attn"], Match.NO),
        ([".*q_proj"], Match.NO),
        ([""], Match.NO),
        ([], Match.NO),
        (None, Match.NO),
    ],
)
def test_a_list_matches_whole_names_and_endings_cut_at_a_dot(targets, expected):
    assert match(config(target_modules=targets), Q_PROJ) is expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (r".*\.q_proj", Match.YES),
        (r".*\.layers\.[0-3]\..*", Match.YES),
        ("q_proj", Match.NO),
        (r"model\.layers", Match.NO),
        ("all-linear", Match.NO),
        ("", Match.NO),
    ],
)
def test_a_string_is_a_regular_expression_for_the_whole_name(targets, expected):
    assert match(config(target_modules=targets), Q_PROJ) is expected


def test_a_config_without_targets_matches_nothing():
    assert match(config(), Q_PROJ) is Match.NO


def test_only_yes_is_true():
    assert [bool(answer) for answer in (Match.YES, Match.NO, Match.EXCLUDED)] == [True, False, False]


# exclude_modules and modules_to_save


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [
        (["q_proj"], Match.EXCLUDED),
        ([Q_PROJ], Match.EXCLUDED),
        (["model.layers.3"], Match.YES),
        (["proj"], Match.YES),
        (r".*\.layers\.3\..*", Match.EXCLUDED),
        ("q_proj", Match.YES),
        ([], Match.YES),
        ("", Match.YES),
        (None, Match.YES),
    ],
)
def test_exclude_modules_goes_before_target_modules(excluded, expected):
    assert match(config(target_modules=["q_proj"], exclude_modules=excluded), Q_PROJ) is expected


def test_what_is_excluded_is_reported_so_even_if_no_target_names_it():
    assert match(config(target_modules=["v_proj"], exclude_modules=["q_proj"]), Q_PROJ) is Match.EXCLUDED
    assert match(config(target_modules=None, exclude_modules=["q_proj"]), Q_PROJ) is Match.EXCLUDED


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (["q_proj"], Match.EXCLUDED),
        (["self_attn"], Match.EXCLUDED),
        (["layers.3"], Match.EXCLUDED),
        (["model"], Match.EXCLUDED),
        (["score", r"layers\.\d"], Match.EXCLUDED),
        (["attn"], Match.YES),
        (["(self|cross)_at"], Match.YES),
        (["self|cross"], Match.EXCLUDED),  # without brackets, "self" may be the beginning of a component
        (["score"], Match.YES),
        ([], Match.YES),
        (None, Match.YES),
    ],
)
def test_no_adapter_goes_into_a_module_that_is_saved_whole(saved, expected):
    assert match(config(target_modules=["q_proj"], modules_to_save=saved), Q_PROJ) is expected


# layers_to_transform and layers_pattern


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (3, Match.YES),
        ([3], Match.YES),
        ([1, 3], Match.YES),
        ([], Match.YES),
        (None, Match.YES),
        (0, Match.NO),
        ([0], Match.NO),
        (33, Match.NO),
    ],
)
def test_layers_to_transform_keeps_the_layers_of_that_index(layers, expected):
    assert match(config(target_modules=["q_proj"], layers_to_transform=layers), Q_PROJ) is expected


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.1.experts.0.w1", 1),
        ("model.encoder.layers.12.w1", 12),
        ("model.0.layers.1.w1", 1),
        ("layers.1.w1", None),
        ("layers.1.experts.0.w1", 0),  # PEFT takes the experts for the layers here; layers_pattern helps
        ("model.layers.w1", None),
        ("model.layers.1", None),
    ],
)
def test_the_layer_index_is_the_first_number_from_the_third_component_on(name, layer):
    chosen = [
        index for index in range(20) if match(config(target_modules=["w1", "1"], layers_to_transform=[index]), name)
    ]
    assert chosen == ([] if layer is None else [layer])


@pytest.mark.parametrize(
    ("pattern", "layer"),
    [
        ("layers", 1),
        ("experts", 0),
        (["experts"], 0),
        (["blocks", "experts", "layers"], 0),  # the first pattern that occurs
        ("(layers|experts)", 1),
        (".*experts", 0),
        ("decoder.layers", 1),
        ("layer", None),
        ("blocks", None),
        (["blocks", "h"], None),
        ("", 1),
        ([], 1),
        (None, 1),
        ([""], None),
        (
            "blocks|decoder.layers",
            1,
        ),  # without brackets this means: blocks, or at the beginning, decoder.layers.<index>
        ("blocks|layers", None),
        ("decoder|layers", None),
        (["decoder|layers", "experts"], None),
    ],
)
def test_layers_pattern_says_which_number_is_the_layer(pattern, layer):
    name = "decoder.layers.1.experts.0.w1"
    chosen = [
        index
        for index in range(20)
        if match(config(target_modules=["w1"], layers_to_transform=[index], layers_pattern=pattern), name)
    ]
    assert chosen == ([] if layer is None else [layer])


def test_a_name_given_in_full_is_a_target_whatever_its_layer():
    assert match(config(target_modules=[Q_PROJ], layers_to_transform=[0]), Q_PROJ) is Match.YES


def test_a_regular_expression_chooses_its_layers_itself():
    assert match(config(target_modules=".*q_proj", layers_to_transform=[0]), Q_PROJ) is Match.YES


# target_parameters


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["gate_up_proj"], True),
        (["experts.gate_up_proj"], True),
        (["model.layers.0.experts.gate_up_proj"], True),
        (["down_proj", "gate_up_proj"], True),
        (["up_proj"], False),
        (["experts"], False),
        (["layers.0.*"], False),
        ([], False),
        (None, False),
    ],
)
def test_target_parameters_names_paths_and_their_endings(targets, expected):
    assert match_parameter(config(target_parameters=targets), "model.layers.0.experts.gate_up_proj") is expected


def test_exclusions_and_layers_have_no_say_over_parameters():
    everything_else = config(
        target_parameters=["up"], exclude_modules=["up"], modules_to_save=["up"], layers_to_transform=[5]
    )
    assert match_parameter(everything_else, "model.layers.0.experts.up")
    assert not match_parameter(config(), "model.layers.0.experts.up")


# rank_pattern and alpha_pattern


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"q_proj": 1}, 1),
        ({"self_attn.q_proj": 1}, 1),
        ({Q_PROJ: 1}, 1),
        ({r"layers\.[0-3]\..*": 1}, 1),
        ({"k_proj|q_proj": 1}, 1),
        ({"k_proj": 1, ".*_proj": 2, "q_proj": 3}, 2),  # the first that matches
        ({"proj": 1}, 8),
        ({"self_attn": 1}, 8),
        ({"^q_proj": 1}, 8),
        ({f"^{Q_PROJ}": 1}, 1),
        ({"^model.*q_proj$": 1}, 1),
        ({}, 8),
    ],
)
def test_a_pattern_matches_the_end_of_a_name_cut_at_a_dot(patterns, expected):
    assert pattern_value(patterns, Q_PROJ, 8) == expected


def test_a_key_spelled_like_the_name_counts_even_if_it_means_another_thing_as_an_expression():
    assert pattern_value({"w+": 1}, "w+", 8) == 1


# mistakes


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "("},
        {"exclude_modules": "("},
        {"modules_to_save": ["("]},
        {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "("},
    ],
)
def test_a_bad_regular_expression_is_named_with_its_field(fields):
    with pytest.raises(ValueError, match=rf"'\(' in {list(fields)[-1]} is not a regular expression"):
        compile_matcher(config(**fields))


def test_a_bad_pattern_key_is_named():
    with pytest.raises(ValueError, match=r"'q\(' in rank_pattern or alpha_pattern is not a regular expression"):
        pattern_value({"q(": 1}, "q", 8)


# Equality with PEFT

components = st.sampled_from(
    ["model", "layers", "h", "experts", "attn", "q_proj", "proj", "w1", "0", "1", "12", "score"]
)
names = st.lists(components, min_size=1, max_size=7).map(".".join)


@st.composite
def endings(draw: st.DrawFn, name: str) -> str:
    """A name, more often than not one that ends the given one."""
    parts = name.split(".")
    return draw(st.one_of(st.integers(0, len(parts) - 1).map(lambda start: ".".join(parts[start:])), names, components))


@st.composite
def expressions(draw: st.DrawFn, name: str) -> str:
    """A regular expression built from parts of the given name, of other names, and of wildcards."""
    part = st.sampled_from([*name.split("."), "h", "q_proj", r"\d+", ".*", r"[^.]*", "(h|layers)", "(?:q|w)_?", ""])
    parts = draw(st.lists(part, min_size=1, max_size=5))
    return draw(st.sampled_from([r"\.", ".", r".*\.", "|"])).join(parts)


@st.composite
def cases(draw: st.DrawFn) -> tuple[peft.LoraConfig, str]:
    name = draw(names)
    by_name = st.one_of(st.lists(endings(name), max_size=3), expressions(name))
    targets = draw(st.none() | by_name | by_name)
    excluded = draw(st.none() | by_name)
    saved = draw(st.none() | st.lists(endings(name) | expressions(name), max_size=2))
    # PEFT allows no targets only together with target_parameters.
    parameters = ["weight"] if targets is None else None
    return (
        peft.LoraConfig(
            target_modules=targets, target_parameters=parameters, exclude_modules=excluded, modules_to_save=saved
        ),
        name,
    )


@st.composite
def layered_cases(draw: st.DrawFn) -> tuple[peft.LoraConfig, str]:
    """A name with many numbers in it, and a config that targets it in some of the layers."""
    numbered = st.lists(st.tuples(components, st.sampled_from(["0", "1", "12", "mlp"])), min_size=1, max_size=4)
    parts = [*draw(st.just([]) | st.just(["model"])), *sum(draw(numbered), ()), "w1"]
    name = ".".join(parts)
    container = st.sampled_from(parts) | endings(name) | expressions(name) | st.just("")
    return (
        peft.LoraConfig(
            target_modules=draw(st.sampled_from([["w1"], ["w1"], ["w1"], [name]])),
            layers_to_transform=draw(st.sampled_from([0, 1, 12, [], [0], [1, 12]])),
            layers_pattern=draw(st.none() | container | container | st.lists(container, max_size=3)),
        ),
        name,
    )


@given(cases())
def test_match_answers_as_peft_does(case):
    assert_answers_as_peft_does(*case)


@given(layered_cases())
def test_layers_are_told_apart_as_peft_does(case):
    assert_answers_as_peft_does(*case)


def assert_answers_as_peft_does(lora_config: peft.LoraConfig, name: str) -> None:
    answer = tuners_utils.check_target_module_exists(lora_config, name)
    found = match(TargetOptions(**{option: getattr(lora_config, option) for option in OF_MODULES}), name)
    assert bool(found) == bool(answer)
    assert (found is Match.EXCLUDED) == isinstance(answer, tuners_utils._ExcludedModule)


@given(st.data(), names)
def test_pattern_value_answers_as_peft_does(data, name):
    keys = data.draw(st.lists(st.one_of(endings(name), expressions(name), expressions(name).map("^{}".format))))
    patterns = {key: index for index, key in enumerate(keys)}
    assert pattern_value(patterns, name, -1) == patterns.get(get_pattern_key(list(patterns), name), -1)


@given(st.data(), st.lists(components, min_size=2, max_size=4))
def test_match_parameter_answers_as_peft_does(data, path):
    *module, parameter = path
    targets = data.draw(st.lists(endings(".".join(path)), min_size=1, max_size=3))
    assert match_parameter(config(target_parameters=targets), ".".join(path)) == (
        ".".join(path) in parameters_that_peft_adapts(".".join(module), parameter, targets)
    )


def parameters_that_peft_adapts(module: str, parameter: str, targets: list[str]) -> list[str]:
    """Runs PEFT's walk over the parameters of a model that has one, without building the adapter."""
    model = nn.Module()
    inner = model
    for component in module.split("."):
        inner.add_module(component, child := nn.Module())
        inner = child
    inner.register_parameter(parameter, nn.Parameter())
    tuner = SimpleNamespace(
        _check_target_module_compatiblity=lambda *_: None, _create_and_replace=lambda *_, **__: None
    )
    return tuners_utils.BaseTuner._inject_parameters(
        tuner,  # type: ignore[arg-type]
        peft.LoraConfig(target_modules=[], target_parameters=targets),
        model,
        adapter_name="default",
        low_cpu_mem_usage=False,
    )


def test_the_default_targets_are_those_of_peft():
    ours = {key: value if isinstance(value, str) else list(value) for key, value in DEFAULT_TARGET_MODULES.items()}
    assert ours == PEFT_TARGET_MODULES


# all-linear


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("all-linear", True), ("All-Linear", True), ("linear", False), (["all-linear"], False), (None, False)],
)
def test_all_linear_is_a_string_in_any_case(targets, expected):
    assert is_all_linear(targets) is expected


LLAMA = LlamaConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    pad_token_id=0,
)
GPT2 = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
BERT = BertConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=8,
)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "SEQ_CLS", peft.TaskType.SEQ_CLS])
@pytest.mark.parametrize(
    ("model_class", "model_config"),
    [
        (LlamaForCausalLM, LLAMA),
        (LlamaForSequenceClassification, LLAMA),
        (GPT2LMHeadModel, GPT2),
        (GPT2ForSequenceClassification, GPT2),
        (BertForSequenceClassification, BERT),
    ],
)
def test_all_linear_names_the_modules_that_peft_does(model_class: type[PreTrainedModel], model_config, task_type):
    model = model_class(model_config)
    lora_config = peft.LoraConfig(target_modules="all-linear", task_type=task_type)
    tuners_utils._maybe_include_all_linear_layers(lora_config, model)
    expected = lora_config.target_modules
    assert isinstance(expected, set)
    found = all_linear_names(model, task_type)
    assert set(found) == expected
    assert found == [name for name, _ in model.named_modules() if name in expected]


class Tied(nn.Module):
    """A model that uses one Linear in two places, has an attention, and a layer that `Linear` is no base of."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.again = self.first
        self.attention = nn.MultiheadAttention(2, 1)
        self.conv = nn.Conv1d(2, 2, 1)
        self.classifier = nn.Linear(2, 2)


def test_a_shared_module_has_its_first_name_and_only_transformers_models_have_a_head():
    assert all_linear_names(Tied(), "SEQ_CLS") == ["first", "classifier"]


def test_the_output_projection_of_an_attention_is_no_linear_module_since_it_is_never_called():
    assert "attention.out_proj" not in all_linear_names(Tied(), None)


@pytest.mark.parametrize(
    ("model_class", "model_config", "task_type"),
    [(GPT2LMHeadModel, GPT2, None), (BertForSequenceClassification, BERT, "SEQ_CLS")],
)
def test_a_traced_model_has_the_linear_modules_of_the_model(model_class, model_config, task_type):
    model = model_class(model_config).eval()
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    traced = trace(model, inputs | ({"use_cache": False} if model_class is GPT2LMHeadModel else {}))
    assert set(all_linear_names(traced, task_type)) == set(all_linear_names(model, task_type))


def test_only_a_transformers_model_has_a_known_head():
    model = Tied()
    model.output_head = nn.Linear(2, 2)
    assert output_head(model, "SEQ_CLS") is None


# Defaults


class Described(nn.Module):
    def __init__(self, described_by: Any, **children: nn.Module):
        super().__init__()
        self.config = described_by
        for name, child in children.items():
            self.add_module(name, child)


def test_a_known_model_type_has_default_targets():
    assert default_target_modules(Described(GPT2), DEFAULT_TARGET_MODULES) == ("c_attn",)
    assert default_target_modules(Described({"model_type": "bert"}), DEFAULT_TARGET_MODULES) == ("query", "value")
    assert (
        default_target_modules(Described(SimpleNamespace(model_type="gemma4")), DEFAULT_TARGET_MODULES)
        == DEFAULT_TARGET_MODULES["gemma4"]
    )


def test_an_unknown_model_type_is_an_error_that_offers_names():
    model = Described(
        {"model_type": "mine"},
        up=nn.Linear(2, 2),
        mlp=nn.Sequential(nn.Linear(2, 2)),
        deep=nn.ModuleDict({"up": Tied()}),
    )
    with pytest.raises(ValueError, match="no default target_modules are known for model_type 'mine'") as error:
        default_target_modules(model, DEFAULT_TARGET_MODULES)
    # A bare "0" would also match every first layer.
    assert "target_modules=['up', 'mlp.0', 'first', 'classifier']" in str(error.value)


def test_a_model_without_a_type_goes_by_its_class():
    with pytest.raises(ValueError, match=r"known for class Tied\. Please specify `target_modules`"):
        default_target_modules(Tied(), DEFAULT_TARGET_MODULES)
    with pytest.raises(ValueError, match=r"for class ReLU.* has no linear modules"):
        default_target_modules(nn.ReLU(), DEFAULT_TARGET_MODULES)


# Near misses

LLAMA_NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["qproj"], ["q_proj", "v_proj"]),
        (["attn.q_proj"], ["self_attn.q_proj"]),
        (["model.layer.0.mlp.down_proj"], ["model.layers.0.mlp.down_proj"]),
        (["q_prj", "downproj"], ["q_proj", "down_proj"]),
        ({"gateproj", "downproj"}, ["down_proj", "gate_proj"]),
        (r".*\.q_prj", ["q_proj"]),
        (["embedding"], []),
        ([], []),
    ],
)
def test_near_misses_start_with_what_was_meant(targets, expected):
    assert near_misses(targets, LLAMA_NAMES)[: len(expected)] == expected
    assert expected or not near_misses(targets, LLAMA_NAMES)


def test_near_misses_are_few_distinct_and_match():
    found = near_misses(["qproj", "gproj", "self_attn.kproj"], ["", *LLAMA_NAMES], n=3)
    assert len(found) == len(set(found)) == 3
    assert all(any(match(config(target_modules=[miss]), name) for name in LLAMA_NAMES) for miss in found)
    assert near_misses(["qproj"], LLAMA_NAMES, n=0) == []


@pytest.mark.parametrize("names", [r"0|1\._orig_mod\.0|2", ["0", "1._orig_mod.0", "2"]])
def test_names_with_a_compilers_wrapper_mean_what_they_mean_to_peft(names: Any) -> None:
    def build() -> nn.Module:
        inner: Any = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend="eager")
        return nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 4))

    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=names))
    ours = graphpeft.get_peft_model(build(), graphpeft.LoraConfig(r=2, target_modules=names))
    of_peft = {
        name.removeprefix("base_model.model.").partition(".lora_A")[0]
        for name, _ in theirs.named_parameters()
        if "lora_A" in name
    }
    of_ours = {site.site.name for site in ours.adapter_report().adapted}
    assert {name.replace("_orig_mod.", "") for name in of_peft} == of_ours


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_such_a_name_is_no_end_of_others(option: str) -> None:
    inner: Any = torch.compile(nn.Linear(8, 8), backend="eager")
    model = nn.Sequential(inner, nn.Sequential(nn.Linear(8, 8)))
    options = {"target_modules": r"0|1\.0", option: ["0._orig_mod"]}
    report = graphpeft.get_peft_model(model, graphpeft.LoraConfig(r=2, **options)).adapter_report()
    assert [site.site.name for site in report.adapted] == ["0" if option == "target_modules" else "1.0"]


def test_what_a_compilers_wrapper_has_is_left_out_by_its_name() -> None:
    inner: Any = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend="eager")
    model = nn.Sequential(nn.Linear(8, 8), inner)
    config = graphpeft.LoraConfig(r=2, target_modules=r".*0", exclude_modules=["1._orig_mod.0"])
    assert [site.site.name for site in graphpeft.get_peft_model(model, config).adapter_report().adapted] == ["0"]
