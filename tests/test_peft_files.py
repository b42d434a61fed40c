"""Files and numbers are PEFT's: what one of the two saves the other loads, and both compute the same."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from models import (
    BERT,
    CLASSIFIER,
    CUSTOM,
    EXAMPLES,
    FUNCTIONAL,
    GPT2,
    LLAMA,
    MLP,
    OPT,
    SWIN,
    T5,
    VIT,
    Example,
    call,
    output,
    result,
)
from pairwise import pairwise
from safetensors.torch import load_file
from torch import Tensor, nn

import graphpeft

# what PEFT warns of is PEFT's
pytestmark = pytest.mark.filterwarnings("ignore:::peft")

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=str)
each_way = pytest.mark.parametrize("traced", [False, True], ids=["as-it-is", "traced"])


def adapted_by_peft(example: Example, adapter_name: str = "default", **options: Any) -> Any:
    model = example.build()
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**example.lora | options), adapter_name).eval()


def base(example: Example, traced: bool = False) -> nn.Module:
    model = example.build()
    return models.traced(example, model) if traced else model


def adapted(
    example: Example, traced: bool = False, seed: int = 1, adapter_name: str = "default", **options: Any
) -> Any:
    model = base(example, traced)
    torch.manual_seed(seed)
    return graphpeft.get_peft_model(model, example.config(**options), adapter_name)


def perturb(model: nn.Module, seed: int = 2) -> None:
    """Gives all that is trained other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def assert_same_outputs(model: nn.Module, expected: nn.Module, example: Example) -> None:
    for seed in (0, 1):
        wanted = output(expected, example.inputs(seed))
        difference = (output(model, example.inputs(seed)) - wanted).abs().max()
        assert difference <= 1e-6 * max(1, wanted.abs().max())


def assert_matters(model: nn.Module, example: Example) -> None:
    """Checks that the adapter changes the outputs, so that comparing them says something."""
    difference = output(model, example.inputs()) - output(example.build(), example.inputs())
    assert difference.abs().max() > 1e-2


def assert_same_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(tensors) == sorted(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def config_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(config[name], list):
            config[name] = sorted(config[name])  # PEFT writes sets in the order that they happen to have
    return config


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# the files


@each_way
@each_example
def test_the_files_are_pefts_and_go_both_ways(example: Example, traced: bool, tmp_path: Path) -> None:
    ours, theirs = adapted(example, traced), adapted_by_peft(example)
    assert_same_tensors(graphpeft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert_same_tensors(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs"))
    if example.own_lora is None:
        assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    for model, seed in ((ours, 2), (theirs, 3)):
        perturb(model, seed)
        assert_matters(model, example)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_outputs(peft.PeftModel.from_pretrained(example.build(), tmp_path / "ours").eval(), ours, example)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = graphpeft.PeftModel.from_pretrained(base(example, traced), tmp_path / "theirs")
    assert_same_outputs(loaded, theirs, example)


def test_the_config_file_has_pefts_41_keys_sorted_and_indented(tmp_path: Path) -> None:
    adapted(LLAMA).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert list(config) == sorted(peft.LoraConfig().to_dict())
    assert len(config) == 41
    assert text == json.dumps(config, indent=2, sort_keys=True)


def test_a_config_that_is_saved_and_loaded_trains_what_it_trained(tmp_path: Path) -> None:
    trained = {}
    for library in (graphpeft, peft):
        folder = str(tmp_path / library.__name__)
        library.LoraConfig(**MLP.lora).save_pretrained(folder)
        model: Any = library.get_peft_model(MLP.build(), library.LoraConfig.from_pretrained(folder))
        trained[library] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained[graphpeft] == trained[peft] > 0


@pytest.mark.parametrize("inference_mode", [False, True])
def test_the_config_of_a_saved_adapter_is_for_inference_and_the_models_own_stays(
    inference_mode: bool, tmp_path: Path
) -> None:
    for model, folder in ((adapted(MLP), tmp_path / "ours"), (adapted_by_peft(MLP), tmp_path / "theirs")):
        model.set_adapter("default", inference_mode=inference_mode)
        before = model.peft_config["default"].inference_mode
        model.save_pretrained(folder)
        assert config_of(folder)["inference_mode"]
        assert model.peft_config["default"].inference_mode == before


def test_functional_weights_trained_with_dropout_load_in_peft_which_knows_none_for_them(tmp_path: Path) -> None:
    ours = adapted(FUNCTIONAL, lora_dropout=0.1)
    perturb(ours)
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.1 is saved as 0"):
        ours.save_pretrained(tmp_path)
    assert_same_outputs(peft.PeftModel.from_pretrained(FUNCTIONAL.build(), tmp_path).eval(), ours, FUNCTIONAL)


def test_functional_weights_are_saved_as_target_parameters(tmp_path: Path) -> None:
    adapted(FUNCTIONAL).save_pretrained(tmp_path)
    config = config_of(tmp_path)
    assert sorted(config["target_parameters"]) == ["one.v", "one.w", "two.e", "two.v", "two.w"]


# elsewhere the file is PEFT's, which both load
@pytest.mark.parametrize("example", [FUNCTIONAL, CUSTOM], ids=str)
def test_a_traced_model_loads_what_the_model_itself_saves_and_the_other_way_round(
    example: Example, tmp_path: Path
) -> None:
    model, graph = adapted(example), adapted(example, traced=True)
    perturb(model)
    model.save_pretrained(tmp_path / "model")
    graph.save_pretrained(tmp_path / "graph")
    of_model = graphpeft.PeftModel.from_pretrained(base(example, traced=True), tmp_path / "model")
    of_graph = graphpeft.PeftModel.from_pretrained(base(example), tmp_path / "graph")
    assert_same_outputs(of_model, model, example)
    assert_same_outputs(of_graph, graph, example)


def test_a_layer_inside_of_what_ends_in_an_entry_of_modules_to_save_is_trained_both_ways(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["fc1"], "modules_to_save": ["p"], "init_lora_weights": False}
    theirs = adapted_by_peft(VIT, **options)
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"fc1 beside the adapter there, as in PEFT"):
        graphpeft.get_peft_model(VIT.build(), graphpeft.LoraConfig(**VIT.lora | options))
    ours = graphpeft.PeftModel.from_pretrained(VIT.build(), tmp_path)
    assert_same_outputs(ours, theirs, VIT)
    assert_same_tensors(graphpeft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs))


class HeadOfLayers(nn.Module):
    """A head as that of RoBERTa, with a bias of its own and layers with one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.out = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.dense(x))) + self.bias


def with_head_of_layers() -> nn.Module:
    return nn.Sequential(OrderedDict(up=nn.Linear(6, 6), between=nn.Linear(6, 6), act=nn.Tanh(), head=HeadOfLayers()))


HEAD_OF_LAYERS = Example(
    "head-of-layers",
    with_head_of_layers,
    lambda generator: (torch.randn(5, 6, generator=generator),),
    {"target_modules": ["up"]},
)


CONTAINERS = {
    "head-of-layers": (HEAD_OF_LAYERS, ["head"]),
    "head-of-layers and a layer": (HEAD_OF_LAYERS, ["head", "between"]),
    "bert": (BERT, ["attention.output"]),
    "timm-vit": (VIT, ["mlp", "head"]),
}


@pairwise(container=CONTAINERS, adapter_name=["default", "other"], bias=["all", "lora_only"])
def test_biases_beside_a_container_in_modules_to_save_are_loaded_from_pefts_files(
    container: tuple[Example, list[str]], adapter_name: str, bias: str, tmp_path: Path
) -> None:
    example, saved = container
    targets = ["query" if example is BERT else "qkv" if example is VIT else "up"]
    theirs = adapted_by_peft(example, adapter_name, target_modules=targets, bias=bias, modules_to_save=saved)
    perturb(theirs)
    assert_matters(theirs, example)
    theirs.save_pretrained(tmp_path)
    ours = graphpeft.PeftModel.from_pretrained(
        example.build(), tmp_path if adapter_name == "default" else tmp_path / adapter_name
    )
    assert_same_outputs(ours, theirs, example)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(example.build(), tmp_path / "ours").eval()
    assert_same_outputs(again, theirs, example)


def test_a_layer_that_ends_in_an_entry_of_modules_to_save_is_refused() -> None:
    options: dict[str, Any] = {"target_modules": ["down"], "modules_to_save": ["wn"]}
    with pytest.raises(TypeError, match="cannot be applied"):
        adapted_by_peft(MLP, **options)
    with pytest.raises(graphpeft.AdaptError, match="down: modules_to_save trains it fully"):
        graphpeft.get_peft_model(MLP.build(), graphpeft.LoraConfig(**MLP.lora | options))


def test_pefts_state_dict_goes_into_our_model() -> None:
    ours, theirs = adapted(FUNCTIONAL), adapted_by_peft(FUNCTIONAL)
    perturb(theirs)
    graphpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    assert_same_outputs(ours, theirs, FUNCTIONAL)


def test_our_state_dict_goes_into_pefts_model() -> None:
    ours, theirs = adapted(FUNCTIONAL), adapted_by_peft(FUNCTIONAL)
    perturb(ours)
    peft.set_peft_model_state_dict(theirs, graphpeft.get_peft_model_state_dict(ours))
    assert_same_outputs(ours, theirs, FUNCTIONAL)


# the options


def option(name: str, example: Example, **options: Any) -> Any:
    return pytest.param(example, options, id=f"{name}-{example}")


# what changes numbers alone, as `use_rslora`, is in the product's cells
OPTIONS = [
    option(
        "patterns",
        LLAMA,
        rank_pattern={"layers.0.self_attn.q_proj": 3, "v_proj": 5},
        alpha_pattern={"^model.layers.1.self_attn.q_proj": 20, r".*\.1\..*v_proj": 3},
    ),
    option("patterns", FUNCTIONAL, rank_pattern={"one.w": 2, "inner": 3}, alpha_pattern={r"two\.[ve]": 30}),
    option("patterns", CUSTOM, rank_pattern={"scaled.weight": 2}, alpha_pattern={"transposed.weight": 30}),
    option("patterns", GPT2, rank_pattern={"c_attn": 2}, fan_in_fan_out=True),
    option("bias-all", BERT, bias="all"),
    option("bias-all", SWIN, bias="all"),
    option("bias-lora-only", OPT, bias="lora_only"),
    option("bias-lora-only", GPT2, bias="lora_only"),
    option("modules-to-save", LLAMA, modules_to_save=["lm_head", "embed_tokens"]),
    option("modules-to-save", VIT, modules_to_save=["head", "norm", "patch_embed"]),
    option("seq-cls", CLASSIFIER, task_type="SEQ_CLS"),
    option("seq-cls-all-linear", CLASSIFIER, task_type="SEQ_CLS", target_modules="all-linear"),
    option("causal-lm", LLAMA, task_type="CAUSAL_LM"),
    option("seq-2-seq-lm", T5, task_type="SEQ_2_SEQ_LM"),
    option("layers", LLAMA, layers_to_transform=[1]),
    option("layers", OPT, layers_to_transform=0, layers_pattern="layers"),
    option("layers", VIT, layers_to_transform=[0], layers_pattern=["blocks"]),
    option("exclude", LLAMA, exclude_modules=["layers.0.self_attn.q_proj"]),
    option("exclude", VIT, exclude_modules=r"blocks\.1\..*"),
    option("regex", LLAMA, target_modules=r".*\.0\..*(k|gate)_proj"),
    option("all-linear", LLAMA, target_modules="all-linear"),
    option("all-linear", GPT2, target_modules="ALL-LINEAR"),
    option("default-targets", LLAMA, target_modules=None),
    option("default-targets", GPT2, target_modules=None),
    option("parameters", VIT, target_modules=["fc1"], target_parameters=["qkv.weight", "blocks.0.mlp.fc2.weight"]),
    option("bias-all-beside-parameters", FUNCTIONAL, bias="all"),
    option("bias-lora-only-beside-parameters", FUNCTIONAL, bias="lora_only"),
]


@pytest.mark.parametrize(("example", "options"), OPTIONS)
def test_an_option_means_what_it_means_to_peft(example: Example, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = adapted_by_peft(example, **options)
    ours = adapted(example, **example.lora | options)  # targets are named in PEFT's way
    assert_same_tensors(graphpeft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs))
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    assert_same_outputs(ours, theirs, example)

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours_config, theirs_config = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    if theirs_config["target_parameters"]:
        assert ours_config["target_parameters"]
        # PEFT keeps the ends of paths that it was given, this library writes the paths
        for name in ("target_modules", "target_parameters"):
            del ours_config[name], theirs_config[name]
    for name in ("rank_pattern", "alpha_pattern"):
        # this library writes the site of each
        assert bool(ours_config.pop(name)) == bool(theirs_config.pop(name))
    assert ours_config == theirs_config

    perturb(ours)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_outputs(peft.PeftModel.from_pretrained(example.build(), tmp_path / "ours").eval(), ours, example)

    perturb(theirs)
    assert_matters(theirs, example)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_outputs(graphpeft.PeftModel.from_pretrained(example.build(), tmp_path / "theirs"), theirs, example)


@pytest.mark.parametrize(("example", "options"), [case for case in OPTIONS if "default-targets" not in str(case.id)])
def test_an_option_means_the_same_for_a_traced_model(example: Example, options: dict[str, Any]) -> None:
    named = example.lora | options
    model, graph = adapted(example, **named), adapted(example, traced=True, **named)
    perturb(model)
    graphpeft.set_peft_model_state_dict(graph, graphpeft.get_peft_model_state_dict(model))
    assert_same_outputs(graph, model, example)


@pytest.mark.parametrize(
    ("example", "options"),
    [
        option("bias-all-of-a-shared-module", MLP, bias="all"),
        option("bias-all-and-modules-to-save", OPT, bias="all", modules_to_save=["fc2"]),
        option("bias-all-and-modules-to-save", CLASSIFIER, bias="all", task_type="SEQ_CLS"),
    ],
)
def test_files_go_both_ways_where_pefts_holds_a_tensor_twice(
    example: Example, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = adapted_by_peft(example, **options)
    perturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_outputs(graphpeft.PeftModel.from_pretrained(example.build(), tmp_path / "theirs"), theirs, example)

    ours = adapted(example, **options)
    perturb(ours)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_outputs(peft.PeftModel.from_pretrained(example.build(), tmp_path / "ours").eval(), ours, example)


def test_a_config_of_pefts_is_as_good_as_ours(tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 3, "bias": "lora_only", "target_modules": ["q_proj", "fc1"]}
    model = OPT.build()
    config: Any = peft.LoraConfig(**options)
    torch.manual_seed(1)
    of_theirs = graphpeft.get_peft_model(model, config)
    of_ours = adapted(OPT, **options)
    of_theirs.save_pretrained(tmp_path / "theirs")
    of_ours.save_pretrained(tmp_path / "ours")
    assert_same_tensors(tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours"))
    assert config_of(tmp_path / "theirs") == config_of(tmp_path / "ours")


def test_a_config_of_four_keys_is_enough(tmp_path: Path) -> None:
    theirs = adapted_by_peft(MLP, r=4, lora_alpha=3)
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    few = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "target_modules": ["up", "down", "head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(few))
    assert_same_outputs(graphpeft.PeftModel.from_pretrained(MLP.build(), tmp_path), theirs, MLP)


# several adapters


def test_a_named_adapter_lies_in_a_folder_of_its_name(tmp_path: Path) -> None:
    ours, theirs = adapted(MLP), adapted_by_peft(MLP)
    for model, config in ((ours, MLP.config(r=2)), (theirs, peft.LoraConfig(**MLP.lora, r=2))):
        model.add_adapter("other", config)
        model.save_pretrained(tmp_path / type(model).__name__)
    assert files(tmp_path / "Mlp") == files(tmp_path / "PeftModel")
    other = tensors_of(tmp_path / "Mlp" / "other")
    assert {name: t.shape for name, t in other.items()} == {
        name: t.shape for name, t in tensors_of(tmp_path / "PeftModel" / "other").items()
    }


@pytest.mark.parametrize("example", [MLP, FUNCTIONAL], ids=str)
def test_a_named_adapter_goes_both_ways(example: Example, tmp_path: Path) -> None:
    ours = adapted(example, adapter_name="other", bias="lora_only")
    perturb(ours)
    ours.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(example.build(), tmp_path / "ours" / "other", adapter_name="mine").eval()
    assert_same_outputs(loaded, ours, example)

    theirs = adapted_by_peft(example, adapter_name="other", bias="lora_only")
    perturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = graphpeft.PeftModel.from_pretrained(example.build(), tmp_path / "theirs" / "other", adapter_name="mine")
    assert_same_outputs(loaded, theirs, example)


@pytest.mark.parametrize("active", ["default", "other"])
def test_of_two_adapters_the_chosen_one_acts_as_in_peft(active: str, tmp_path: Path) -> None:
    theirs = adapted_by_peft(LLAMA)
    theirs.add_adapter("other", peft.LoraConfig(target_modules=["v_proj", "up_proj"], r=3))
    for name in ("default", "other"):
        theirs.set_adapter(name)
        perturb(theirs)
    theirs.save_pretrained(tmp_path)

    ours = graphpeft.PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    ours.load_adapter(tmp_path / "other", "other")
    ours.set_adapter(active)
    theirs.set_adapter(active)
    assert_same_outputs(ours, theirs, LLAMA)


def test_only_the_selected_adapters_are_saved(tmp_path: Path) -> None:
    model = adapted(MLP)
    model.add_adapter("other", MLP.config())
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "other"]


# half precision

HALVES = [torch.float16, torch.bfloat16]


def half_inputs(example: Example, dtype: torch.dtype) -> Any:
    inputs = example.inputs()
    return tuple(x.to(dtype) for x in inputs) if isinstance(inputs, tuple) else inputs


@pairwise(dtype=HALVES, autocast_adapter_dtype={"autocast": True, "no-autocast": False}, example=[LLAMA, GPT2, MLP])
def test_on_half_precision_weights_values_and_dtypes_are_pefts(
    example: Example, dtype: torch.dtype, autocast_adapter_dtype: bool, tmp_path: Path
) -> None:
    adapt: dict[str, Any] = {"autocast_adapter_dtype": autocast_adapter_dtype}
    model = example.build().to(dtype)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model, peft.LoraConfig(**example.lora, init_lora_weights=False), **adapt).eval()
    model = example.build().to(dtype)
    torch.manual_seed(1)
    ours = graphpeft.get_peft_model(model, example.config(init_lora_weights=False), **adapt)
    assert_same_tensors(graphpeft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs))
    inputs = half_inputs(example, dtype)
    assert torch.equal(output(ours, inputs), output(theirs, inputs))

    theirs.save_pretrained(tmp_path)
    loaded = graphpeft.PeftModel.from_pretrained(example.build().to(dtype), tmp_path, **adapt)
    assert torch.equal(output(loaded, inputs), output(theirs, inputs))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_modules_saved_whole_keep_the_dtype_that_peft_gives_them(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "lora_only"}
    ours = graphpeft.get_peft_model(CLASSIFIER.build().to(dtype), graphpeft.LoraConfig(**options))
    theirs = peft.get_peft_model(CLASSIFIER.build().to(dtype), peft.LoraConfig(**options))
    dtypes = {name: tensor.dtype for name, tensor in graphpeft.get_peft_model_state_dict(ours).items()}
    assert dtypes == {name: tensor.dtype for name, tensor in peft.get_peft_model_state_dict(theirs).items()}


# the weights that the adapter stands for

CHANGES = {
    FUNCTIONAL: {
        "one.w": "one.base_layer",
        "one.v": "one",
        "one.inner.weight": "one.base_layer.base_layer.inner",
        "two.w": "two.base_layer.base_layer",
        "two.v": "two.base_layer",
        "two.e": "two",
        "two.inner.weight": "two.base_layer.base_layer.base_layer.inner",
        "head.weight": "head",
    },
    CUSTOM: {"scaled.weight": "scaled", "transposed.weight": "transposed", "plain.weight": "plain"},
}
"""What the tensors in the file are called, by the weight that they change."""


@each_way
@pytest.mark.parametrize("example", CHANGES, ids=str)
def test_adapted_functional_weights_are_the_weights_plus_their_change(example: Example, traced: bool) -> None:
    model = adapted(example, traced, r=3, lora_alpha=5)
    perturb(model)
    tensors = graphpeft.get_peft_model_state_dict(model)
    by_hand = example.build()
    with torch.no_grad():
        for weight, path in CHANGES[example].items():
            A = tensors.pop(f"base_model.model.{path}.lora_A.weight")
            B = tensors.pop(f"base_model.model.{path}.lora_B.weight")
            by_hand.get_parameter(weight).add_(B @ A * 5 / 3)
    assert not tensors
    assert_same_outputs(model, by_hand, example)


@pytest.mark.parametrize("example", CHANGES, ids=str)
def test_target_modules_and_target_parameters_name_functional_weights_alike(example: Example) -> None:
    by_modules, by_parameters = adapted(example), adapted(example, **example.lora)
    assert_same_tensors(
        graphpeft.get_peft_model_state_dict(by_modules), graphpeft.get_peft_model_state_dict(by_parameters)
    )


# training


def gradients_by_key(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    keys = {tensor.data_ptr(): key for key, tensor in tensors.items()}
    return {keys[p.data_ptr()]: p.grad for p in model.parameters() if p.requires_grad}


def trained_step(model: Any, example: Example, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    torch.manual_seed(3)
    loss = result(call(model.train(), example.inputs())).square().mean()
    loss.backward()
    return loss.detach(), gradients_by_key(model, tensors)


@pytest.mark.parametrize(
    ("example", "options"),
    [
        option("dropout", BERT, lora_dropout=0.3, bias="all"),
        option("plain", T5),
        option("plain", SWIN),
        option("plain", FUNCTIONAL),
        option("plain", CUSTOM),
    ],
)
def test_in_training_loss_and_gradients_are_pefts(example: Example, options: dict[str, Any]) -> None:
    ours, theirs = adapted(example, **options), adapted_by_peft(example, **options)
    perturb(theirs)
    graphpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    loss, gradients = trained_step(ours, example, graphpeft.get_peft_model_state_dict(ours))
    expected_loss, expected = trained_step(theirs, example, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert sorted(gradients) == sorted(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(
            gradients[key], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, k=key: f"{k}: {text}"
        )


@pytest.mark.parametrize("example", [GPT2, BERT, MLP], ids=str)
def test_in_training_a_traced_model_draws_the_same_dropout(example: Example) -> None:
    options: dict[str, Any] = {"lora_dropout": 0.3}
    model = adapted(example, **options).train()
    # a graph is of the mode in which the model decided
    graph = graphpeft.get_peft_model(
        graphpeft.trace(example.build().train(), example.inputs()), example.config(**options)
    )
    perturb(model)
    graphpeft.set_peft_model_state_dict(graph, graphpeft.get_peft_model_state_dict(model))
    with torch.no_grad():
        torch.manual_seed(4)
        expected = result(call(model, example.inputs()))
        torch.manual_seed(4)
        torch.testing.assert_close(result(call(graph, example.inputs())), expected, rtol=1e-6, atol=1e-6)


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(tmp_path: Path) -> None:
    adapted(MLP, bias="lora_only").save_pretrained(tmp_path)
    frozen = graphpeft.PeftModel.from_pretrained(MLP.build().train(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training
    trainable = graphpeft.PeftModel.from_pretrained(MLP.build().train(), tmp_path, is_trainable=True)
    theirs = peft.PeftModel.from_pretrained(MLP.build().train(), tmp_path, is_trainable=True)
    assert trainable.training
    assert trainable.get_nb_trainable_parameters()[0] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_a_shared_module_called_model_is_known_by_its_second_name(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.model = nn.Linear(4, 4), nn.LayerNorm(4)
            self.again = self.model

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.linear(self.model(x)))

    torch.manual_seed(0)
    config: dict[str, Any] = {"r": 2, "target_modules": ["linear"], "bias": "all", "init_lora_weights": False}
    base, x = Shared(), torch.randn(2, 4)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
    theirs.save_pretrained(str(tmp_path))
    assert any(".again." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    ours = graphpeft.PeftModel.from_pretrained(base, tmp_path)
    assert (ours(x) - theirs(x)).abs().max() <= 1e-6


class DecidesOnItsInput(nn.Module):
    """Convolves with a parameter, where example inputs alone show that."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(2 * x if x.shape[0] > 1 else x, self.w)


def test_an_adapter_that_needs_example_inputs_says_so_when_it_is_loaded_without(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(DecidesOnItsInput())

    x = torch.randn(2, 6, 8)
    config = graphpeft.LoraConfig(r=2, lora_alpha=6, target_parameters=["0.w"], init_lora_weights=False)
    model = graphpeft.get_peft_model(build(), config, example_inputs=(x,))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        graphpeft.CheckpointError, match=r"0\.w was found to be the weight of a Convolution.*example_inputs"
    ):
        graphpeft.PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(graphpeft.PeftModel.from_pretrained(build(), tmp_path, example_inputs=(x,))(x), model(x))
