"""LoRA at layers that the product has no column for: other shapes and holders of a weight, tied and replicated ones.

Features at a plain layer of each kind are the product's cells; `test_product.py`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from models import CACHE, CLASSES, VOCABULARY, Example, bert_config, llama_config, output
from product import FEATURES, Feature, assert_alike, kind_of
from safetensors.torch import load_file
from torch import Tensor, nn

import graphpeft
from graphpeft import own_weight

# what PEFT warns of is PEFT's
pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


def example(name: str, make: Callable[[], nn.Module], arguments: Callable[[torch.Generator], Any], **lora: Any) -> Any:
    return pytest.param(Example(name, make, arguments, {"r": 4} | lora), id=name)


def images(channels: int, *sizes: int) -> Callable[[torch.Generator], Any]:
    return lambda generator: (torch.randn(2, channels, *sizes, generator=generator),)


def tokens(generator: torch.Generator) -> Any:
    return (torch.randint(0, 12, (2, 7), generator=generator),)


def text(generator: torch.Generator) -> Any:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=generator), "use_cache": False}


# convolutions


def convolutions(*layers: nn.Module) -> Callable[[], nn.Module]:
    """Returns a model of copies of these layers with a nonlinearity between them, drawn anew each time."""

    def make() -> nn.Module:
        made = copy.deepcopy(layers)
        for layer in made:
            layer.reset_parameters()  # type: ignore[operator]
        parts = [part for layer in made for part in (layer, nn.Tanh())]
        return nn.Sequential(*parts, nn.Flatten(), nn.LazyLinear(CLASSES))

    return make


def sized(make: Callable[[], nn.Module], arguments: Callable[[torch.Generator], Any]) -> Callable[[], nn.Module]:
    """Returns a model whose lazy layers have seen an input."""

    def sized_make() -> nn.Module:
        model = make()
        model(*arguments(torch.Generator()))
        return model

    return sized_make


def convolutional(name: str, arguments: Callable[[torch.Generator], Any], *layers: nn.Module, **lora: Any) -> Any:
    return example(name, sized(convolutions(*layers), arguments), arguments, target_modules=["0", "2"], **lora)


CONVOLUTIONS = [
    convolutional("conv1d", images(3, 9), nn.Conv1d(3, 8, 3, 2, 1), nn.Conv1d(8, 6, 1, bias=False)),
    convolutional("conv2d", images(3, 9, 8), nn.Conv2d(3, 8, (3, 2), (2, 1), (1, 0)), nn.Conv2d(8, 6, 1)),
    convolutional("conv3d", images(3, 5, 5, 4), nn.Conv3d(3, 8, 3, 2, 1), nn.Conv3d(8, 6, 2)),
    convolutional("same", images(3, 9, 8), nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 6, 3, padding="valid")),
    convolutional("groups", images(4, 9, 8), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, 2, groups=4)),
    convolutional("depthwise", images(4, 9), nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 8, 3)),
]


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **options)


VISION = [
    example(
        "timm-convnext",
        timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
        images(3, 32, 32),
        target_modules=["conv_dw", "fc1", "fc2", "stem.0", "downsample.1"],
        r=16,
    ),
    example(
        "timm-resnet",
        timm_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)),
        images(3, 32, 32),
        target_modules=["conv1", "conv2", "fc"],
    ),
]


# embeddings


class Words(nn.Module):
    """An embedding before a layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8, **options)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)))


def gemma3(tie_word_embeddings: bool = False) -> nn.Module:
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=32,
            tie_word_embeddings=tie_word_embeddings,
        )
    )


def untied_llama() -> nn.Module:
    return transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=False))


EMBEDDINGS = [
    example("padding", lambda: Words(padding_idx=3), tokens, target_modules=["words"]),
    example("gemma3", gemma3, text, target_modules=["embed_tokens", "q_proj"]),
    example("trained-whole", gemma3, text, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    example("trained-whole-tied", lambda: gemma3(True), text, target_modules=["q_proj"], modules_to_save=["lm_head"]),
]


# rows of embeddings


def tied_llama() -> nn.Module:
    return transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=True))


def tied_gemma3() -> nn.Module:
    return gemma3(tie_word_embeddings=True)


def rows(name: str, make: Callable[[], nn.Module], indices: Any, **lora: Any) -> Any:
    return example(name, make, text, target_modules=["q_proj"], trainable_token_indices=indices, **lora)


ROWS = [
    rows("rows-of-the-head-too", untied_llama, {"embed_tokens": [3, 5, 40], "lm_head": [7]}),
    rows("rows-of-tied", tied_llama, [3, 5, 40]),
    rows("rows-of-tied-ensured", tied_llama, [3, 5, 40], ensure_weight_tying=True),
    rows("rows-of-both-tied", tied_llama, {"embed_tokens": [3, 5], "lm_head": [3, 5]}),
    rows("other-rows-of-tied", tied_llama, {"embed_tokens": [3, 5], "lm_head": [6]}),
    rows("rows-of-gemma3", tied_gemma3, {"embed_tokens": [3, 5, 40]}),
]


# parameters


class Experts(nn.Module):
    """Two stacks of matrices, of which each row of the input has one."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = ((4, 8, 12), (4, 12, 8)) if is_transposed else ((4, 12, 8), (4, 8, 12))
        self.up = nn.Parameter(torch.randn(up) / 3)
        self.down = nn.Parameter(torch.randn(down) / 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_transposed:
            return torch.tanh(x @ self.up) @ self.down
        return torch.einsum("eti,eoi->eto", torch.tanh(torch.einsum("eti,eoi->eto", x, self.up)), self.down)


class OfExperts(nn.Module):
    """Experts before a layer."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(is_transposed)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(x))


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
}


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8, sliding_window=8)
    model = transformers.GptOssForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.1)
    return model


def stacks(generator: torch.Generator) -> Any:
    return (torch.randn(4, 5, 8, generator=generator),)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

PARAMETERS = [
    example("experts", lambda: OfExperts(False), stacks, target_modules=["head"], target_parameters=["up", "down"]),
    example("experts-in-out", lambda: OfExperts(True), stacks, target_modules=[], target_parameters=["up", "down"]),
    example("mixtral", mixtral, text, target_modules=["q_proj"], target_parameters=EXPERTS),
    example("gpt-oss", gpt_oss, text, target_modules=["q_proj"], target_parameters=EXPERTS),
]

# attention


class Attention(nn.Module):
    """Attention between two sequences, or in one."""

    def __init__(self, is_self: bool = True, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Linear(8, CLASSES)
        self.is_self = is_self

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.is_self else torch.flip(x, (1,)) * 2
        return self.head(self.mha(x, other, other, need_weights=False)[0])


def vectors(generator: torch.Generator) -> Any:
    return (torch.randn(3, 5, 8, generator=generator),)


def vision_transformer() -> nn.Module:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=CLASSES
    )
    # its head starts at zero, which would hide every difference
    nn.init.normal_(model.get_parameter("heads.head.weight"))
    return model


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)


ATTENTION = [
    example("mha-cross", lambda: Attention(False), vectors, target_modules=["mha", "head"]),
    example("mha-without-bias", lambda: Attention(bias=False), vectors, target_modules=["mha"], use_rslora=True),
    example("mha-bias-all", Attention, vectors, target_modules=["mha"], bias="all"),
    example("torchvision-vit", vision_transformer, images(3, 32, 32), target_modules=["self_attention", "mlp.0"]),
    example("encoder", encoder, vectors, target_modules=["self_attn", "linear1", "linear2"]),
]

REPLICATED_BERT = example(
    "replicated-bert",
    lambda: transformers.BertModel(bert_config()),
    text,
    target_modules=["query"],
    layer_replication=[(0, 2), (0, 2)],
)
REPLICATED = [
    example("replicated", untied_llama, text, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2), (0, 1)]),
    REPLICATED_BERT,
]

LAYERS = [*CONVOLUTIONS, *VISION, *EMBEDDINGS, *PARAMETERS, *ATTENTION, *ROWS, REPLICATED_BERT]


# equality with PEFT


@pytest.fixture(autouse=True)
def _slow_path() -> Iterator[None]:
    """Turns PyTorch's fast path for attention off, on which PEFT's adapters of layers around it are dead."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(was)


def pefts(example: Example, **options: Any) -> Any:
    model = example.build()
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**example.lora | options)).eval()


def ours(example: Example, **options: Any) -> Any:
    model = example.build()
    torch.manual_seed(1)
    return graphpeft.get_peft_model(model, example.config(**options))


def perturb(model: nn.Module) -> None:
    """Gives all that is trained other values, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, as a part of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def assert_same_outputs(model: nn.Module, expected: nn.Module, example: Example, within: float = 1e-6) -> None:
    for seed in (0, 1):
        wanted = output(expected, example.inputs(seed))
        assert difference(output(model, example.inputs(seed)), wanted) <= within


def assert_matters(model: nn.Module, example: Example) -> None:
    assert difference(output(model, example.inputs()), output(example.build(), example.inputs())) > 1e-3


UNMERGED = ("groups", "depthwise", "timm-convnext", "other-rows-of-tied")
"""What is in groups, and what is tied to something that changes otherwise."""

OTHER_LAYERS = ("replicated-bert", "trained-whole-tied")
"""What is replicated, and what is untied when it is merged, with a warning."""

BY_NAME = {feature.name: feature for feature in FEATURES}
IN_SINGLE = dataclasses.replace(BY_NAME["plain"], tolerance=1e-6)
IN_HALF = [BY_NAME["float16"], BY_NAME["bfloat16, `autocast_adapter_dtype=False`"]]


@pytest.mark.filterwarnings("ignore:Setting config.tie_word_embeddings to False")
@pytest.mark.parametrize("feature", [IN_SINGLE, *IN_HALF], ids=str)
@pytest.mark.parametrize("example", LAYERS)
def test_both_libraries_do_the_same(example: Example, feature: Feature, tmp_path: Path) -> None:
    feature = dataclasses.replace(feature, keeps_layers=example.name not in OTHER_LAYERS)
    assert_alike(feature, kind_of(example.name, example, merges=example.name not in UNMERGED), tmp_path)


# beyond PEFT


def unlike_pefts(*layers: nn.Module, size: tuple[int, ...] = (9, 8)) -> Example:
    arguments = images(4, *size)
    return Example("", sized(convolutions(*layers), arguments), arguments, {"target_modules": ["0", "2"], "r": 4})


@pytest.mark.parametrize(
    "example",
    [
        unlike_pefts(nn.Conv2d(4, 8, 3, dilation=2), nn.Conv2d(8, 6, 1)),
        unlike_pefts(nn.Conv1d(4, 8, 3, dilation=(2,), padding="same"), nn.Conv1d(8, 6, 2), size=(9,)),
        unlike_pefts(nn.Conv2d(4, 8, 3, padding=2, padding_mode="circular"), nn.Conv2d(8, 6, 1)),
        unlike_pefts(nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect"), nn.Conv2d(8, 6, 1)),
        unlike_pefts(nn.Conv3d(4, 8, 2, padding=1, padding_mode="replicate"), nn.Conv3d(8, 6, 1), size=(4, 4, 4)),
        unlike_pefts(nn.ConvTranspose2d(4, 8, 3, 2, output_padding=1), nn.ConvTranspose2d(8, 6, 1, dilation=2)),
        unlike_pefts(nn.ConvTranspose1d(4, 8, 3, 2, 1), nn.ConvTranspose1d(8, 6, 2, dilation=2), size=(9,)),
    ],
    ids=["dilated", "dilated-1d", "circular", "reflect", "replicate", "transposed", "transposed-1d"],
)
def test_convolutions_that_pefts_branch_gets_wrong_are_the_base_plus_the_change(example: Example) -> None:
    model = ours(example)
    perturb(model)
    adapted = output(model, example.inputs())
    merged = model.merge_and_unload()
    assert difference(output(merged, example.inputs()), adapted) <= 2e-6
    assert_matters(merged, example)


def test_peft_fails_on_dilated_convolutions() -> None:
    # once it doesn't, compare with it
    example = unlike_pefts(nn.Conv2d(4, 8, 3, dilation=2), nn.Conv2d(8, 6, 1))
    with pytest.raises(RuntimeError, match="size of tensor"):
        pefts(example)(*example.inputs())


class OwnDims(nn.Module):
    """Attention whose keys and values have other features than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x[..., :4], x[..., :6])[0]


def test_attention_with_dims_of_its_own_is_adapted_by_its_parameters(tmp_path: Path) -> None:
    example = Example("", OwnDims, vectors, {"target_modules": ["mha"], "r": 4})
    with pytest.raises(ValueError, match="same embed"):
        pefts(example)
    model = ours(example)
    assert [adapted.site.name for adapted in model.adapter_report().adapted] == [
        "mha.q_proj_weight",
        "mha.k_proj_weight",
        "mha.v_proj_weight",
        "mha.out_proj.weight",
    ]
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = graphpeft.PeftModel.from_pretrained(example.build(), tmp_path)
    assert_same_outputs(loaded, model, example)
    expected = output(model, example.inputs())
    assert difference(output(model.merge_and_unload(), example.inputs()), expected) <= 1e-6


@pytest.mark.parametrize("example", [example for example in ATTENTION if "mha" not in str(example.id)])
def test_adapted_attention_acts_on_the_fast_path_too(example: Example) -> None:
    model = ours(example, init_lora_weights=False)
    slow = output(model, example.inputs())
    torch.backends.mha.set_fastpath_enabled(True)
    fast = ours(example, init_lora_weights=False)
    assert difference(output(fast, example.inputs()), slow) <= 1e-6


@pytest.mark.parametrize("example", ATTENTION)
def test_attention_in_a_traced_model_has_the_same_adapter(example: Example) -> None:
    model = ours(example, init_lora_weights=False)
    graph = graphpeft.trace(example.build(), example.inputs())
    torch.manual_seed(1)
    graphpeft.get_peft_model(graph, example.config(init_lora_weights=False))
    found, expected = (graphpeft.get_peft_model_state_dict(adapted) for adapted in (graph, model))
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert_same_outputs(graph, model, example)


# dropout at a weight as such

DROPPING = Example("", Attention, vectors, {"target_modules": ["mha", "head"], "lora_dropout": 0.1})


def test_pefts_attention_with_dropout_loads_for_inference_alone(tmp_path: Path) -> None:
    theirs = pefts(DROPPING)
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    model = graphpeft.PeftModel.from_pretrained(DROPPING.build(), tmp_path)
    assert_same_outputs(model, theirs, DROPPING)
    with pytest.raises(graphpeft.AdaptError, match="set lora_dropout=0"):
        graphpeft.PeftModel.from_pretrained(DROPPING.build(), tmp_path, is_trainable=True)
    with pytest.raises(graphpeft.AdaptError, match="was loaded for inference and can't be trained"):
        model.set_adapter("default")
    assert model.peft_config["default"].inference_mode
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter("default", inference_mode=True)
    assert_same_outputs(model, theirs, DROPPING)


def test_attention_and_its_projection_named_together_are_adapted_once() -> None:
    model = ours(DROPPING, lora_dropout=0.0, target_modules=["mha", "mha.out_proj", "mha.in_proj_weight"])
    assert sorted(graphpeft.get_peft_model_state_dict(model)) == sorted(
        graphpeft.get_peft_model_state_dict(ours(DROPPING, lora_dropout=0.0, target_modules=["mha"]))
    )


# the tables of embeddings


def resized(seed: int, size: int = VOCABULARY) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(llama_config(vocab_size=size)).eval()


def files(model: Any, folder: Path, **options: Any) -> dict[str, Tensor]:
    model.save_pretrained(folder, **options)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("setting", "targets"),
    [
        (True, ["q_proj"]),
        (False, ["embed_tokens"]),
        ("auto", ["q_proj"]),
        ("auto", ["embed_tokens"]),
        ("auto", ["model.embed_tokens"]),
        ("auto", r".*(embed_tokens|q_proj)"),
    ],
)
def test_the_embeddings_are_saved_where_peft_saves_them(setting: Any, targets: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": targets}
    model = graphpeft.get_peft_model(resized(0), graphpeft.LoraConfig(**options))
    theirs = peft.get_peft_model(resized(0), peft.LoraConfig(**options))
    found = files(model, tmp_path / "ours", save_embedding_layers=setting)
    expected = files(theirs, tmp_path / "theirs", save_embedding_layers=setting)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in expected.items()}


def test_the_embeddings_of_a_resized_vocabulary_are_saved(tmp_path: Path) -> None:
    resized(0).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCABULARY + 2)
    adapted: Any = graphpeft.get_peft_model(model, graphpeft.LoraConfig(r=2))
    found = files(adapted, tmp_path / "adapter")
    assert "base_model.model.model.embed_tokens.weight" in found
    assert "base_model.model.lm_head.weight" in found


def test_only_saving_says_what_is_lost_in_a_file(tmp_path: Path) -> None:
    example = Example("", OwnDims, vectors, {"target_modules": ["mha"]})
    model = ours(example)
    model.peft_config["default"].lora_dropout = 0.1
    graphpeft.get_peft_model_state_dict(model)
    with pytest.warns(UserWarning, match="is saved as 0"):
        model.save_pretrained(tmp_path)


def test_tables_in_a_file_are_the_models_while_the_adapter_is(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(resized(0), peft.LoraConfig(r=2, init_lora_weights=False)).eval()
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    other = resized(0)
    with torch.no_grad():
        other.get_input_embeddings().weight[5:] += 1
    before = copy.deepcopy(other.state_dict())
    model = graphpeft.PeftModel.from_pretrained(other, tmp_path)
    inputs = {"input_ids": torch.arange(7)[None]}
    assert difference(output(model, inputs), output(theirs, inputs)) <= 1e-6
    merged = copy.deepcopy(model).merge_and_unload()
    assert difference(output(merged, inputs), output(theirs, inputs)) <= 1e-6
    model.unload()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_table_comes_back_if_its_adapter_is_deleted_while_another_is_merged_into_it(tmp_path: Path) -> None:
    theirs: Any = graphpeft.get_peft_model(resized(0), graphpeft.LoraConfig(r=2))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model: Any = graphpeft.PeftModel.from_pretrained(resized(1), tmp_path)
    model.add_adapter("other", graphpeft.LoraConfig(r=3, target_modules=["embed_tokens"], init_lora_weights=False))
    model.set_adapter("other")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="other are merged, and are unmerged first"):
        model.delete_adapter("default")
    assert model.merged_adapters == []
    assert torch.equal(own_weight(model.get_input_embeddings()), resized(1).get_input_embeddings().weight)


def test_a_table_of_another_precision_is_the_models(tmp_path: Path) -> None:
    theirs: Any = graphpeft.get_peft_model(resized(0), graphpeft.LoraConfig(r=2))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    base = resized(0).to(torch.bfloat16)
    before = base.get_input_embeddings().weight.clone()
    model = graphpeft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_table_that_other_adapters_do_not_know_is_refused(tmp_path: Path) -> None:
    theirs: Any = graphpeft.get_peft_model(resized(0), graphpeft.LoraConfig(r=2))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model: Any = graphpeft.get_peft_model(resized(1), graphpeft.LoraConfig(r=2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(graphpeft.CheckpointError, match="would compute something else"):
        model.load_adapter(tmp_path, "other")
    assert sorted(model.state_dict()) == sorted(before)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("gathered", [False, True])
def test_a_merged_table_is_saved_and_compared_as_it_was_before(gathered: bool, tmp_path: Path) -> None:
    config = graphpeft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    model: Any = graphpeft.get_peft_model(resized(0), config)
    inputs = {"input_ids": torch.arange(7)[None]}
    expected = output(model, inputs)
    model.merge_adapter()
    model.save_pretrained(tmp_path, state_dict=model.state_dict() if gathered else None)
    assert torch.equal(output(graphpeft.PeftModel.from_pretrained(resized(0), tmp_path), inputs), expected)
    model.load_adapter(tmp_path, "again")
    assert model.merged_adapters == ["default"]
    with pytest.warns(UserWarning, match="unmerged"):
        model.set_adapter("again")
    assert torch.equal(output(model, inputs), expected)


def test_a_model_may_tell_its_input_embedding_alone(tmp_path: Path) -> None:
    class Telling(Words):
        def get_input_embeddings(self) -> nn.Module:
            return self.words

    config = graphpeft.LoraConfig(r=2, target_modules=["words"], init_lora_weights=False)
    model: Any = graphpeft.get_peft_model(Telling(), config)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.words.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    graphpeft.PeftModel.from_pretrained(Telling(), tmp_path)


def sounds() -> Any:
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,),
        conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def test_a_model_of_sounds_that_has_no_embedding_of_tokens_is_saved(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        sounds().get_input_embeddings()
    model: Any = graphpeft.get_peft_model(sounds(), graphpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    graphpeft.PeftModel.from_pretrained(sounds(), tmp_path)


def test_a_model_of_sounds_that_has_no_embedding_of_tokens_takes_no_prompts_of_tokens() -> None:
    config = graphpeft.PromptTuningConfig(num_virtual_tokens=2, task_type=graphpeft.TaskType.FEATURE_EXTRACTION)
    with pytest.raises(graphpeft.AdaptError, match="a Wav2Vec2Model has no get_input_embeddings"):
        graphpeft.get_peft_model(sounds(), config)


def test_a_table_of_another_size_is_refused(tmp_path: Path) -> None:
    theirs: Any = graphpeft.get_peft_model(resized(0, VOCABULARY + 2), graphpeft.LoraConfig(r=2))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(graphpeft.CheckpointError, match=r"embed_tokens\.weight of shape \(66, 32\)"):
        graphpeft.PeftModel.from_pretrained(resized(0), tmp_path)


# rows of embeddings


def by_rows(indices: Any, make: Callable[[], nn.Module] = tied_llama, **options: Any) -> graphpeft.LoraConfig:
    return graphpeft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"trainable_token_indices": [VOCABULARY]}, "it has rows 0 to 63, and none of index 64"),
        ({"trainable_token_indices": [-1]}, "none of index -1"),
        ({"trainable_token_indices": [3, 3]}, "named, each once"),
        ({"trainable_token_indices": []}, "named, each once"),
        ({"trainable_token_indices": {"embed_token": [3]}}, "names no module; near misses: embed_tokens"),
        ({"trainable_token_indices": {"norm": [3]}}, "has no table"),
        ({"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}, "fully trained by modules_to_save"),
        ({"trainable_token_indices": [3], "target_modules": ["embed_tokens"]}, "can't both act"),
        (
            {"trainable_token_indices": [3], "target_modules": ["lm_head"]},
            r"tied to model\.embed_tokens, and an adapter",
        ),
        (
            {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}, "ensure_weight_tying": True},
            "which ensure_weight_tying forbids",
        ),
    ],
)
def test_rows_that_cannot_be_trained_are_refused(options: dict[str, Any], reason: str) -> None:
    torch.manual_seed(0)
    model = tied_llama()
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(graphpeft.AdaptError, match=reason):
        graphpeft.get_peft_model(model, Example("", tied_llama, text, {"target_modules": ["q_proj"]}).config(**options))
    assert [type(module) for module in model.modules()] == classes
    assert sorted(model.state_dict()) == sorted(before)


@pytest.mark.parametrize("example", ROWS)
def test_rows_of_a_traced_model_are_the_models(example: Example) -> None:
    model = ours(example)
    perturb(model)
    graph = graphpeft.trace(example.build(), example.inputs())
    graphpeft.get_peft_model(graph, example.config())
    graphpeft.set_peft_model_state_dict(graph, graphpeft.get_peft_model_state_dict(model))
    assert_same_outputs(graph, model, example)


@pytest.mark.parametrize("example", ROWS)
def test_copies_keep_their_rows_and_unload_takes_them_off(example: Example) -> None:
    model = ours(example)
    perturb(model)
    copied = copy.deepcopy(model)
    assert_same_outputs(copied, model, example)
    copied.unload()
    base = example.build()
    assert sorted(copied.state_dict()) == sorted(base.state_dict())
    assert torch.equal(output(copied, example.inputs()), output(base, example.inputs()))
    with model.disable_adapter():
        assert torch.equal(output(model, example.inputs()), output(base, example.inputs()))


def test_different_rows_of_tied_weights_cannot_be_merged() -> None:
    model = graphpeft.get_peft_model(tied_llama(), by_rows({"embed_tokens": [3], "lm_head": [4]}))
    with pytest.raises(graphpeft.AdaptError, match=r"embed_tokens\.weight is tied to lm_head\.weight"):
        model.merge_and_unload()


def test_two_adapters_act_together_if_their_rows_are_different_ones() -> None:
    model = graphpeft.get_peft_model(tied_llama().eval(), by_rows([3, 4]))
    model.add_adapter("other", by_rows([5]))
    model.add_adapter("same", by_rows([4, 6]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 1
    model.set_adapter(["default", "other"])
    table = model.get_input_embeddings().weight
    changed = (table - model.get_input_embeddings()._parameters["weight"]).abs().sum(1).nonzero().flatten()
    assert changed.tolist() == [3, 4, 5]
    with pytest.raises(graphpeft.AdaptError, match="both train rows of"):
        model.set_adapter(["default", "same"])
    assert model.active_adapters == ["default", "other"]


# half precision


def test_a_change_in_half_precision_is_rounded_as_pefts_before_it_is_merged() -> None:
    lora: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["0"], "init_lora_weights": False}
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 30)).bfloat16()
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**lora), autocast_adapter_dtype=False)
    perturb(theirs)
    model: Any = graphpeft.get_peft_model(base, graphpeft.LoraConfig(**lora), autocast_adapter_dtype=False)
    graphpeft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(theirs))
    merged = model.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in theirs.merge_and_unload().state_dict().items())


# replicated layers


@pytest.mark.parametrize("example", REPLICATED)
def test_unload_gives_a_model_its_own_layers_back(example: Example) -> None:
    base: Any = example.build()
    names, layers = list(base.state_dict()), [id(module) for module in base.modules()]
    count = base.config.num_hidden_layers
    expected = output(base, example.inputs())
    flags = [parameter.requires_grad for parameter in base.parameters()]
    report = graphpeft.explain(base, example.config())
    assert [id(module) for module in base.modules()] == layers
    model = graphpeft.get_peft_model(base, example.config())
    assert len(report.adapted) == len(model.adapter_report().adapted) == base.config.num_hidden_layers
    with pytest.raises(graphpeft.AdaptError, match="is tied to"):
        model.merge_and_unload()
    model.unload()
    assert [id(module) for module in base.modules()] == layers
    assert list(base.state_dict()) == names
    assert base.config.num_hidden_layers == count
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    assert torch.equal(output(base, example.inputs()), expected)


@pytest.mark.parametrize("example", REPLICATED[:1])
def test_copies_and_generation_of_replicated_layers(example: Example) -> None:
    model = ours(example)
    perturb(model)
    assert_same_outputs(copy.deepcopy(model), model, example)
    inputs = example.inputs()["input_ids"][:1]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = model.generate(inputs, use_cache=True, **options)
    assert with_cache.tolist() == model.generate(inputs, use_cache=False, **options).tolist()


def test_replicated_layers_keep_what_each_has_seen_in_a_cache() -> None:
    model: Any = graphpeft.get_peft_model(untied_llama(), replicating([(0, 2), (0, 2)]))
    perturb(model)
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = model(ids[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], **{CACHE: seen}).logits
        assert difference(last, model(ids, use_cache=False).logits[:, -1:]) <= 1e-5


def test_replicated_layers_keep_the_kinds_of_those_that_they_replicate() -> None:
    kinds = ["sliding_attention", "full_attention"]
    base: Any = transformers.LlamaForCausalLM(llama_config())
    base.config.layer_types = kinds
    model: Any = graphpeft.get_peft_model(base, replicating([(1, 2), (0, 2)]))
    assert model.config.layer_types == [kinds[1], kinds[0], kinds[1]]


def replicating(pairs: Any) -> graphpeft.LoraConfig:
    return graphpeft.LoraConfig(target_modules=["q_proj"], layer_replication=pairs)


@pytest.mark.parametrize(
    ("make", "pairs", "reason"),
    [
        (untied_llama, [(0, 3)], r"has the pair \(0, 3\), and the model layers 0 to 1"),
        (untied_llama, [(1, 1)], r"has the pair \(1, 1\)"),
        (lambda: graphpeft.trace(untied_llama(), text(torch.Generator())), [(0, 1)], "is a graph"),
    ],
)
def test_layers_that_cannot_be_replicated_are_refused(make: Callable[[], nn.Module], pairs: Any, reason: str) -> None:
    model = make()
    modules = [id(module) for module in model.modules()]
    with pytest.raises(graphpeft.AdaptError, match=reason):
        graphpeft.get_peft_model(model, replicating(pairs))
    assert [id(module) for module in model.modules()] == modules


def test_a_refused_config_leaves_the_layers_alone() -> None:
    model: Any = untied_llama()
    modules = [id(module) for module in model.modules()]
    config = graphpeft.LoraConfig(target_modules=["none"], layer_replication=[(0, 2), (0, 2)])
    with pytest.raises(graphpeft.AdaptError, match="nothing in LlamaForCausalLM matches"):
        graphpeft.get_peft_model(model, config)
    assert [id(module) for module in model.modules()] == modules
    assert model.config.num_hidden_layers == 2


def test_a_dry_run_leaves_the_layers_alone() -> None:
    model: Any = untied_llama()
    modules = [id(module) for module in model.modules()]
    report = graphpeft.explain(model, replicating([(0, 2), (0, 2)]))
    assert len(report.adapted) == 4
    assert [id(module) for module in model.modules()] == modules
    assert model.config.num_hidden_layers == 2


def test_further_adapters_have_the_layers_that_there_are() -> None:
    model: Any = graphpeft.get_peft_model(untied_llama(), replicating([(0, 2), (0, 2)]))
    model.add_adapter("same", replicating([(0, 2), (0, 2)]))
    assert len(model.adapter_report("same").adapted) == 4
    with pytest.raises(graphpeft.AdaptError, match="changes the layers of a model that has adapters"):
        model.add_adapter("other", replicating([(0, 2), (1, 2)]))
    model.add_adapter("none", replicating(None))
    assert sorted(model.peft_config) == ["default", "none", "same"]


class ByName(nn.Module):
    """Calls layers by names that it makes, and takes their outputs apart, so that it runs its own code."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.map_a, self.map_b = layer(8, 8), layer(8, 8, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for name in ("a", "b"):
            scale, shift = getattr(self, f"map_{name}")(t).chunk(2, dim=1)
            x = x * (1 + scale) + shift
        return x


class Deciding(nn.Linear):
    """A layer without a graph, whose own code computes with the weight."""

    def forward(self, input: Tensor) -> Tensor:
        assert input.isfinite().all()
        return self.computed(input, self.weight)

    def computed(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w, self.bias)


class Converting(Deciding):
    """Such a layer that lets its input and its weight be of one kind first."""

    def computed(self, x: Tensor, w: Tensor) -> Tensor:
        w = w if w.is_contiguous() else w.contiguous()
        return super().computed(x.type_as(w).to(w), w.to(x.device).to(x.dtype).contiguous())


class InDoublePrecision(Deciding):
    """Such a layer that computes in double precision."""

    def computed(self, x: Tensor, w: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.double()
        return F.linear(x.double(), w.double(), bias).float()


class Turning(Deciding):
    """Such a layer that spells its product otherwise."""

    def computed(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.swapaxes(0, 1) if self.bias is None else torch.addmm(self.bias, x, w.t())


@pytest.mark.parametrize("layer", [nn.Linear, Deciding, Converting, InDoublePrecision, Turning])
def test_a_layer_in_a_module_that_runs_its_own_code_has_pefts_dropout(layer: Any) -> None:
    torch.manual_seed(0)
    base, x, t = ByName(layer), torch.randn(2, 4), torch.randn(2, 8)
    found: list[list[Tensor]] = []
    for library in (peft, graphpeft):
        torch.manual_seed(1)
        config = library.LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=["map_a", "map_b"])
        model: Any = library.get_peft_model(copy.deepcopy(base), config).train()
        torch.manual_seed(2)
        y = model(x, t)
        y.sum().backward()
        of_adapter = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        found.append([y, *of_adapter, model.eval()(x, t), model.merge_and_unload()(x, t)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(found[0][0], found[0][-1])


def test_a_weight_is_shown_where_dropout_acts_on_products_with_it() -> None:
    config = graphpeft.LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=["0"])
    model: Any = graphpeft.get_peft_model(nn.Sequential(Deciding(2, 2)), config)
    with torch.no_grad():
        shown = repr(model.eval()[0].weight)
        assert repr(model.train()[0].weight) == shown
    with pytest.raises(RuntimeError, match="lora_dropout drops elements"):
        model[0].weight.norm()
