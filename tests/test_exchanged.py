"""A module with adapters is not exchanged, or given another size, without a word."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import LLAMA, VOCABULARY
from refusals import refused
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from transformers import LlavaConfig, LlavaForConditionalGeneration

import graphpeft
from graphpeft import (
    AdaptError,
    LoraConfig,
    PeftWarning,
    PromptTuningConfig,
    TaskType,
    TrainableTokensConfig,
    get_peft_model,
)
from graphpeft.graph.paths import modules_by_path

ON_THE_TABLE: dict[str, Any] = {
    "LoRA": LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False),
    "rows": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "rows alone": TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
    "a trained copy": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
}
each_config = pytest.mark.parametrize("config", ON_THE_TABLE.values(), ids=ON_THE_TABLE)

IDS = torch.tensor([[1, 5, 2]])


def adapted(config: Any = None) -> Any:
    return get_peft_model(LLAMA.build(), copy.deepcopy(config or ON_THE_TABLE["LoRA"]))


def another() -> nn.Embedding:
    return nn.Embedding(VOCABULARY, 32)


# assignments


ASSIGNMENTS: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda model: setattr(model.model, "embed_tokens", another()),
    "the setter of a part": lambda model: model.model.set_input_embeddings(another()),
    "the setter of the model": lambda model: model.set_input_embeddings(another()),
    "add_module": lambda model: model.model.add_module("embed_tokens", another()),
    "nothing": lambda model: setattr(model.model, "embed_tokens", None),
    "what is around it": lambda model: setattr(model, "model", LLAMA.build().model),
}


@pytest.mark.parametrize("assign", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
@each_config
def test_a_table_with_an_adapter_is_not_exchanged(config: Any, assign: Callable[[Any], Any]) -> None:
    model = adapted(config)
    before = model(IDS).logits
    with refused(model, AdaptError, "'default' is on ", "embed_tokens", "would be exchanged without it", "unload()"):
        assign(model)
    assert torch.equal(model(IDS).logits, before)
    assign(model.unload())


def test_a_member_of_a_container_is_not_exchanged() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), LoraConfig(target_modules=["0"]))
    with refused(model, AdaptError, "'default' is on 0 in a Sequential, which would be exchanged"):
        model[0] = nn.Linear(4, 4)
    model[1] = nn.GELU()


def test_a_module_that_reads_an_adapted_weight_is_exchanged_like_any_other() -> None:
    class Scaled(nn.Module):
        def __init__(self, up: nn.Linear) -> None:
            super().__init__()
            self.up = up

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, 2 * self.up.weight)

    model: Any = nn.Sequential(Scaled(nn.Linear(4, 4, bias=False)))
    get_peft_model(model, LoraConfig(target_modules=["up"], init_lora_weights=False))
    x = torch.randn(2, 4)
    before = model(x)
    model[0] = Scaled(model[0].up)
    assert torch.equal(model(x), before)


def test_copies_and_pickles_are_not_exchanged_either() -> None:
    for other in (copy.deepcopy(adapted()), pickle.loads(pickle.dumps(adapted()))):
        with pytest.raises(AdaptError, match="'default' is on embed_tokens in a LlamaModel"):
            other.model.embed_tokens = another()


def test_modules_around_the_adapted_one_and_copies_of_it_take_its_place() -> None:
    model = adapted()
    expected = model(IDS).logits
    model.model.embed_tokens = checkpoint_wrapper(model.model.embed_tokens)
    assert torch.equal(model(IDS).logits, expected)
    model = adapted()
    model.model.embed_tokens = copy.deepcopy(model.model.embed_tokens)
    assert torch.equal(model(IDS).logits, expected)
    layers = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(2, 4)
    expected = layers(x)
    layers[0] = nn.Sequential(layers[0])  # it acts, though no file could name it
    assert torch.equal(layers(x), expected)


def test_an_adapted_model_is_exchanged_as_a_whole() -> None:
    holder = nn.Module()
    for _ in range(2):
        holder.model = adapted()
    holder.inner = nn.ModuleList([adapted()])
    holder.inner = nn.ModuleList()


def test_layers_are_moved_within_their_list() -> None:
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model: Any = nn.Module()
    model.layers = layers
    get_peft_model(model, LoraConfig(target_modules=["0", "2"]))
    model.layers = nn.ModuleList([nn.Linear(4, 4), *layers[1:], layers[0]])
    with pytest.raises(AdaptError, match=r"'default' is on layers\.2 in a "):
        model.layers = nn.ModuleList([*layers[:2], nn.Linear(4, 4)])


def test_other_modules_are_exchanged() -> None:
    model = adapted()
    model.lm_head = nn.Linear(32, 7, bias=False)
    assert model(IDS).logits.shape[-1] == 7


class Product(nn.Module):
    """A block that multiplies with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(F.linear(x, self.w))


class Sine(Product):
    """Such a block that goes on in another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(F.linear(x, self.w))


class InTurn(nn.Module):
    """A model that calls its blocks in turn."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList([block]), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def assert_adapted_anew(model: Any, target: str, name: str = "new") -> None:
    """Asserts that a fresh adapter changes nothing, and acts and can be merged once it has values."""
    x = torch.randn(3, 4)
    with model.disable_adapter():
        expected = model(x)
    model.add_adapter(name, LoraConfig(r=2, target_modules=[target]))
    model.set_adapter(name)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x, adapter_names=[name, "__base__", name]), expected)
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        nn.init.normal_(parameter)
    changed = model(x)
    assert not torch.allclose(changed, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), changed, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_layer_that_follows_one_whose_adapters_were_deleted_has_its_own_graph(is_mixed: bool) -> None:
    model: Any = get_peft_model(InTurn(nn.Linear(4, 4, bias=False)), LoraConfig(r=2, target_modules=["0"]))
    if is_mixed:
        model(torch.randn(2, 4), adapter_names=["default", "__base__"])
    model.delete_adapter("default")
    model.blocks[0] = nn.Linear(4, 4)
    assert_adapted_anew(model, "0")


def test_a_block_in_the_place_of_one_whose_adapter_rests_has_its_own_graph() -> None:
    model: Any = get_peft_model(InTurn(Product()), LoraConfig(r=2, target_modules=["w"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["last"]))
    model.set_adapter("other")
    model.blocks.pop(0)
    model.blocks.append(Sine())
    assert_adapted_anew(model, "w")


@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_block_whose_code_was_replaced_after_its_adapters_were_deleted_has_a_new_graph(is_mixed: bool) -> None:
    block: Any = type("Own", (Product,), {})
    model: Any = get_peft_model(InTurn(block()), LoraConfig(r=2, target_modules=["w"]))
    if is_mixed:
        model(torch.randn(2, 4), adapter_names=["default", "__base__"])
    model.delete_adapter("default")
    block.forward = Sine.forward
    assert_adapted_anew(model, "w")


class Products(nn.Module):
    """A block that multiplies with two weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.relu(F.linear(x, self.w)), self.v)


class Turned(Products):
    """Such a block that multiplies with them the other way round."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.sin(F.linear(x, self.v)), self.w)


def resting(block: nn.Module, *targets: str) -> Any:
    """Returns a model with a block whose adapter rests."""
    model: Any = get_peft_model(InTurn(block), LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["last"]))
    model.set_adapter("other")
    return model


def test_each_weight_of_a_block_in_the_place_of_another_has_its_site_there() -> None:
    model = resting(Products(), "w", "v")
    model.blocks.pop(0)
    model.blocks.append(Turned())
    assert_adapted_anew(model, "w")
    model.unmerge_adapter()
    assert_adapted_anew(model, "v", "newer")


def test_a_layer_that_moves_up_as_the_one_before_it_is_taken_away_has_its_own_graph() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4)])
    model = resting(nn.Sequential(layers[0], layers[1]), "0.0", "0.1")
    del model.blocks[0][0]
    assert_adapted_anew(model, "blocks.0.0")


def test_a_block_with_an_adapter_inside_has_a_new_graph_once_its_own_adapters_are_deleted() -> None:
    cls: Any = type("Own", (Product,), {"forward": lambda self, x: torch.relu(self.inner(F.linear(x, self.w)))})
    block = cls()
    block.inner = nn.Linear(4, 4)
    model: Any = get_peft_model(InTurn(block), LoraConfig(r=2, target_modules=["w"]))
    model(torch.randn(2, 4), adapter_names=["default", "__base__"])
    model.add_adapter("inside", LoraConfig(r=2, target_modules=["inner"]))
    model.set_adapter("inside")
    model.delete_adapter("default")
    cls.forward = lambda self, x: torch.sin(self.inner(F.linear(x, self.w)))
    assert_adapted_anew(model, "w")


def test_a_resting_adapter_does_not_act_in_another_class_than_it_was_made_for() -> None:
    model, x = resting(Product(), "w"), torch.randn(3, 4)
    block = model.blocks[0]
    model.set_adapter("default")
    expected = model(x)
    model.set_adapter("other")
    block.__class__ = Sine
    model.add_adapter("new", LoraConfig(r=2, target_modules=["w"]))
    block.__class__ = Product
    with pytest.raises(AdaptError, match="another module than the Sine"):
        model.set_adapter("default")
    model.delete_adapter("new")
    block.__class__ = Product
    assert model(x).shape == expected.shape


def test_a_class_that_changes_itself_when_it_is_looked_through_is_left_alone() -> None:
    class Restoring(nn.Linear):
        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    adapted()
    model = nn.Sequential(Restoring(2, 2))
    model[0] = Restoring(2, 2)


# what goes past an assignment


def past(model: Any) -> None:
    del model.model.embed_tokens
    model.model.embed_tokens = another()


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(IDS),
        lambda model: model.train()(IDS),
        lambda model: model.generate(IDS, max_new_tokens=1),
        lambda model: model.set_adapter("default"),
        lambda model: model.merge_adapter(),
        lambda model: model.save_pretrained("unwritten"),
    ],
)
@each_config
def test_a_model_without_its_adapters_table_is_not_used(config: Any, use: Callable[[Any], Any]) -> None:
    model = adapted(config)
    model(IDS)
    table = model.model.embed_tokens
    past(model)
    with pytest.raises(
        AdaptError,
        match=r"model\.embed_tokens\.(default\.\w+|token_adapter\.\w+\.default) of adapter 'default' is gone",
    ):
        use(model)
    model.model.embed_tokens = table
    model(IDS)


def test_only_active_adapters_are_looked_for() -> None:
    model = adapted()
    expected = model(IDS).logits
    model.add_adapter("head", LoraConfig(target_modules=["lm_head"]))
    model.set_adapter("head")
    past(model)
    model(IDS)
    with model.disable_adapter():
        model(IDS)
    with pytest.raises(AdaptError, match="of adapter 'default' is gone"):
        model.set_adapter("default")
    model.delete_adapter("default")
    assert not torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(IDS),
        lambda model: model.set_adapter("default"),
        lambda model: model.merge_adapter(),
        lambda model: model.save_pretrained("unwritten"),
    ],
)
@each_config
def test_a_table_that_a_part_of_the_model_has_resized_is_not_used(config: Any, use: Callable[[Any], Any]) -> None:
    model = adapted(config)
    model(IDS)
    model.model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    with pytest.raises(AdaptError, match=rf"embed_tokens\.weight has the shape \({VOCABULARY + 3}, 32\) now, and had"):
        use(model)


@pytest.mark.parametrize("use", [lambda model: model, lambda model: copy.deepcopy(model)])
def test_a_table_that_tells_fewer_rows_than_it_has_is_used(use: Callable[[Any], Any]) -> None:
    table = nn.Embedding(16, 8)
    table.num_embeddings = 12  # without those that are there for the sake of a multiple
    config = TrainableTokensConfig(target_modules=["0"], token_indices=[1, 13])
    model = use(get_peft_model(nn.Sequential(table, nn.Linear(8, 3)), config))
    model.set_adapter("default")
    assert model(IDS).shape == (1, 3, 3)
    model[0].num_embeddings = 14
    with pytest.raises(AdaptError, match=r"0\.weight has the shape \(14, 8\) now, and had \(12, 8\)"):
        model(IDS)


def test_a_part_of_a_multimodal_model_resizes_nothing_unnoticed() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16, **sizes}
    text = {"model_type": "llama", "vocab_size": 30, **sizes}
    base = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=29, vision_feature_layer=-1)
    )
    model: Any = get_peft_model(base, LoraConfig(target_modules=["embed_tokens"]))
    inner = model.model.language_model
    with refused(model, AdaptError, "'default' is on embed_tokens in a LlamaModel"):
        inner.set_input_embeddings(nn.Embedding(30, 16))
    inner.resize_token_embeddings(33, mean_resizing=False)
    with pytest.raises(AdaptError, match=r"embed_tokens\.weight has the shape \(33, 16\) now, and had \(30, 16\)"):
        model(IDS)


# what it costs


def test_a_call_looks_again_only_after_something_was_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    model(IDS)
    looked: list[Any] = []

    def looks(module: Any) -> Any:
        looked.append(module)
        return modules_by_path(module)

    monkeypatch.setattr("graphpeft.adapters.exchanged.modules_by_path", looks)
    model(IDS)
    model.lm_head = copy.deepcopy(model.lm_head)
    model(IDS)
    assert not looked
    model.model.embed_tokens = copy.deepcopy(model.model.embed_tokens)
    model(IDS)
    model(IDS)
    assert looked == [model]


def test_compiled_code_is_not_compiled_anew_for_other_modules() -> None:
    model, compiled = adapted(), []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    call = torch.compile(model, backend=backend)
    expected = model(IDS).logits
    for _ in range(3):
        assert torch.equal(call(IDS).logits, expected)
        nn.Sequential(nn.Linear(2, 2))
    assert len(compiled) == 1


def test_a_prompt_has_its_place_at_the_model_itself() -> None:
    model = get_peft_model(LLAMA.build(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    assert model(IDS).logits.shape[1] == model(IDS).logits.shape[1] == 5


# copies


class Stack(nn.Module):
    """Layers in a list, as a decoder has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def stack() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=r"layers\.\d\.0", init_lora_weights=False)
    return get_peft_model(Stack(), config).eval()


PUTS: dict[str, Callable[[Any, nn.Module], Any]] = {
    "append": lambda model, block: model.layers.append(block),
    "attribute": lambda model, block: setattr(model, "more", block),
    "with another one": lambda model, block: model.layers.append(nn.Sequential(nn.Identity(), block)),
}


def reloaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], nn.Module]] = {
    "alone": lambda model: copy.deepcopy(model.layers[1]),
    "with its model": lambda model: copy.deepcopy(model).layers[1],
    "by pickle": lambda model: pickle.loads(pickle.dumps(model)).layers[1],
    "by pickle alone": lambda model: pickle.loads(pickle.dumps(model.layers[1])),
    "by a file": lambda model: reloaded(model).layers[1],
}
CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "forward": lambda model, folder: model(torch.ones(3, 4)),
    "save": lambda model, folder: model.save_pretrained(folder / "adapter"),
    "state dict": lambda model, folder: graphpeft.get_peft_model_state_dict(model),
    "disable": lambda model, folder: model.disable_adapter().__enter__(),
    "merge": lambda model, folder: model.merge_adapter(),
    "merge for good": lambda model, folder: model.merge_and_unload(),
    "unload": lambda model, folder: model.unload(),
    "delete": lambda model, folder: model.delete_adapter("default"),
}


@pytest.mark.parametrize("put", PUTS.values(), ids=PUTS)
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_copy_of_an_adapted_block_is_refused_where_nothing_would_manage_it(
    call: Any, make: Any, put: Any, tmp_path: Path
) -> None:
    model = stack()
    x, block = torch.randn(3, 4), make(model)
    assert torch.equal(block(x), model.layers[1](x))
    before = model(x)
    put(model, block)
    with pytest.raises(AdaptError, match=r"was copied with adapter 'default' from another place"):
        call(model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert torch.equal(model.layers[1](model.layers[0](x).relu()).relu(), before)


def test_a_copy_in_the_place_of_an_adapted_block_is_part_of_the_adapter() -> None:
    model = stack()
    model.layers[1] = copy.deepcopy(model).layers[1]
    before = model(x := torch.randn(3, 4))
    assert torch.allclose(model.merge_and_unload()(x), before, atol=1e-6)


def test_a_copy_of_an_adapted_block_is_part_of_models_without_adapters() -> None:
    model = stack()
    x, block = torch.randn(3, 4), copy.deepcopy(model.layers[1])
    around = nn.Sequential(block, nn.Identity())
    assert torch.equal(copy.deepcopy(around)(x), model.layers[1](x))


def _replace(model: Any, block: nn.Module) -> None:
    model.layers[2] = block


def _beside(model: Any, block: nn.Module) -> None:
    model.side.append(block)


def _around(model: Any, block: nn.Module) -> None:
    model.side = nn.Sequential(block)


def _inserted(model: Any, block: nn.Module) -> None:
    # no hook of a registration runs
    model.layers.insert(len(model.layers), block)


@pytest.mark.parametrize("put", [_replace, _beside, _around, _inserted])
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("call", ["forward", "disable"])
def test_a_copy_that_comes_later_to_another_place_is_refused(put: Any, make: Any, call: str, tmp_path: Path) -> None:
    base = stack().unload()
    base.layers.append(nn.Identity())
    base.side = nn.Sequential(nn.Identity())
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=r"layers\.[01]\.0", init_lora_weights=False))
    block = make(model)
    model(torch.ones(3, 4))
    put(model, block)
    with pytest.raises(AdaptError, match=r"was copied with adapter 'default' from another place"):
        CALLS[call](model, tmp_path)


@pytest.mark.parametrize("call", [name for name in CALLS if name != "delete"])
def test_models_in_models_have_adapters_of_the_same_name(call: str, tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.v(self.q(x))

    inner: Any = get_peft_model(Two(), LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    outer: Any = get_peft_model(nn.Sequential(inner, nn.ReLU()), LoraConfig(r=2, target_modules=["v"]))
    x = torch.randn(3, 4)
    assert torch.equal(outer(x), inner(x).relu())
    CALLS[call](inner, tmp_path)
    CALLS[call](outer, tmp_path)


def test_a_copy_of_a_whole_model_can_be_part_of_others() -> None:
    model = stack()
    x = torch.randn(3, 4)
    copies: list[Any] = [
        copy.deepcopy(model),
        copy.deepcopy(nn.Sequential(model))[0],
        copy.deepcopy([model])[0],
        copy.deepcopy((model.layers[1], model))[1],
    ]
    for copied in copies:
        assert torch.equal(nn.Sequential(copied)(x), model(x))
        copied.layers.append(nn.Identity())
    # what was copied first is part of the copy of the model all the same
    first: Any = copy.deepcopy((model.layers[1], model))
    first[1].again = first[0]
    first[0][0].bias = nn.Parameter(torch.zeros(4))
    assert not torch.equal(first[1](x), model(x))


def test_a_copy_of_an_unloaded_block_goes_anywhere() -> None:
    model: Any = stack().merge_and_unload()
    model.layers.append(copy.deepcopy(model.layers[1]))
    assert len(model.layers) == 3


@pytest.mark.parametrize(
    ("fuse", "layer", "norm"),
    [
        (fuse_linear_bn_eval, nn.Linear(4, 6), nn.BatchNorm1d(6)),
        (fuse_conv_bn_eval, nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)),
    ],
    ids=["linear", "convolution"],
)
def test_pytorchs_fusion_of_an_adapted_layer_is_refused_and_of_a_merged_one_right(
    fuse: Any, layer: nn.Module, norm: Any
) -> None:
    norm.running_mean.normal_()
    base = nn.Sequential(copy.deepcopy(layer), norm).eval()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    x = torch.randn(5, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 7, 7)
    expected = model(x)
    with pytest.raises(RuntimeError, match="is a copy of one with adapters, without their model"):
        fuse(model[0], model[1])
    assert torch.equal(model(x), expected)
    model.merge_and_unload()
    torch.testing.assert_close(fuse(model[0], model[1])(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_eager_quantisation_tells_that_it_leaves_adapted_layers_and_finds_merged_ones() -> None:
    base = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    x = torch.randn(5, 4)
    expected = model(x)
    quantise: Any = functools.partial(
        torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear}, dtype=torch.qint8
    )
    with pytest.warns(PeftWarning, match=r"leaves adapted layers as they are.*merge_and_unload\(\) before"):
        quantised = quantise(model)
    whose = "torch.ao.nn.quantized.dynamic.modules.linear"
    assert [type(layer).__module__ for layer in quantised][::2] == ["torch.nn.modules.linear", whose]
    torch.testing.assert_close(quantised(x), expected, atol=0.1, rtol=0.1)
    assert torch.equal(model(x), expected)
    merged = quantise(model.merge_and_unload())
    assert [type(layer).__module__ for layer in merged][::2] == [whose, whose]
    torch.testing.assert_close(merged(x), expected, atol=0.1, rtol=0.1)
