"""Adapted models under ``torch.compile`` with its default backend compute what they compute without it.

One model holds a layer of each kind, so that one compilation tries them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from models import LLAMA, result
from oracle import assert_close, perturb
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from transformers.pytorch_utils import Conv1D

import graphpeft
from graphpeft import LoraConfig, TaskType, get_peft_model, optimize, trace
from graphpeft._torch import pytree
from graphpeft.passes import PASSES

ALL_PASSES = tuple(each.name for each in PASSES)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Draws the random numbers that are drawn without a compiler."""
    with inductor_config.patch(fallback_random=True):
        yield


class Rounded(nn.Module):
    """A linear layer whose weight is no floating-point number."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 8
        self.register_buffer("numbers", torch.randint(-4, 4, (8, 6), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.numbers.to(x.dtype) / 8)  # type: ignore[operator]


class Layers(nn.Module):
    """A layer of each kind, those of rows of features on matrices and on stacks of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.without_bias, self.rounded = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), Rounded()
        self.flipped = Conv1D(8, 6)
        self.sequence, self.image, self.volume = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, padding=1), nn.Conv3d(4, 6, 2)
        self.upwards = nn.ConvTranspose2d(4, 6, 3, 2)
        self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.head.weight = self.embedding.weight
        self.w, self.table = nn.Parameter(torch.randn(8, 6) / 3), nn.Parameter(torch.randn(9, 6) / 3)
        self.experts = nn.Parameter(torch.randn(2, 8, 6) / 3)

    def forward(self, rows: Tensor, stack: Tensor, image: Tensor, volume: Tensor, tokens: Tensor) -> list[Tensor]:
        values = []
        for x in (rows, stack):
            values += [self.linear(x), self.without_bias(x), self.flipped(x), self.rounded(x), F.linear(x, self.w)]
        values += [self.sequence(image.flatten(2)), self.image(image), self.volume(volume), self.upwards(image)]
        for ids in (tokens[0], tokens):
            values += [self.head(torch.tanh(self.embedding(ids))), F.embedding(ids, self.table)]
        values += [torch.einsum("bti,eoi->bto", stack, self.experts)]
        return values


class Few(nn.Module):
    """Some of these layers, with the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.image = nn.Linear(6, 8), nn.Conv2d(4, 6, 3)
        self.embedding = nn.Embedding(9, 6)

    def forward(self, rows: Tensor, stack: Tensor, image: Tensor, volume: Tensor, tokens: Tensor) -> list[Tensor]:
        return [self.linear(rows), self.linear(stack), self.image(image), self.embedding(tokens[0])]


FEW = ["linear", "image", "embedding"]


class Attending(nn.Module):
    """An attention, which is given stacks alone."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, stack: Tensor) -> Any:
        return self.attention(stack, stack, stack, need_weights=self.need_weights)[0]


FLOATS = [(4, 6), (2, 3, 6), (2, 4, 5, 5), (2, 4, 3, 3, 3)]
ROWS = ["linear", "without_bias", "flipped"]
CONVOLUTIONS = ["sequence", "image", "volume", "upwards"]
PARAMETERS = ["w", "table", "experts"]


class Method(NamedTuple):
    """A way to adapt the layers.

    Attributes:
        targets: Which.
        options: Of a config.
        dtype: That of the base.
        config: The method.
    """

    targets: list[str]
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    config: Any = LoraConfig

    def adapted(self, flat: bool = False, passes: tuple[str, ...] = ()) -> Any:
        torch.manual_seed(0)
        model: Any = Layers().to(self.dtype)
        if flat:
            model = trace(model, inputs(self.dtype))
        options = {"init_lora_weights": False, **self.options}
        model = get_peft_model(model, self.config(r=2, lora_alpha=5, target_modules=self.targets, **options))
        optimize(model, passes)
        return model


def inputs(dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    floats = [torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad) for shape in FLOATS]
    return *floats, torch.randint(0, 9, (2, 3), generator=generator)


METHODS = {
    "plain": Method([*ROWS, *CONVOLUTIONS, *PARAMETERS, "embedding", "rounded"], {}),
    "rslora": Method([*ROWS, *CONVOLUTIONS, "embedding", "rounded"], {"use_rslora": True}),
    "dropout": Method([*ROWS, *CONVOLUTIONS, "w", "rounded"], {"lora_dropout": 0.4}),
    "dora": Method([*ROWS, *CONVOLUTIONS, *PARAMETERS, "embedding"], {"use_dora": True}),
    "dora-dropout": Method([*ROWS, *CONVOLUTIONS, "w"], {"use_dora": True, "lora_dropout": 0.4}),
    "bias-of-b": Method(["linear", "flipped", *CONVOLUTIONS], {"lora_bias": True, "bias": "lora_only"}),
    "parts": Method(
        ["linear", "flipped"], {"target_parts": {name: [[0, 2], [5, 8]] for name in ("linear", "flipped")}}
    ),
    "tied": Method(["embedding", "head"], {"ensure_weight_tying": True}),
    "cast": Method([*ROWS, *CONVOLUTIONS, "embedding", "w", "rounded"], {}, torch.bfloat16),
    "cast-dropout": Method([*ROWS, *CONVOLUTIONS, "w"], {"lora_dropout": 0.4}, torch.bfloat16),
}
PER_CALL = Method(ROWS, {}, config=graphpeft.LoraPerCallConfig)


def computed(model: Any, run: Callable[..., Any], given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Returns what a model computes, and the gradients of that if it is in training."""
    torch.manual_seed(2)
    if not model.training:
        with torch.no_grad():
            return dict(enumerate(pytree.tree_leaves(run(*given))))  # type: ignore[arg-type]
    values = pytree.tree_leaves(run(*given))
    sources = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    sources |= {f"input {index}": x for index, x in enumerate(given) if x.requires_grad}
    loss = torch.stack([value.float().square().mean() for value in values]).sum()
    gradients = torch.autograd.grad(loss, [*sources.values()], allow_unused=True)
    found = {**dict(zip(sources, gradients, strict=True)), **{f"value {i}": v for i, v in enumerate(values)}}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_compiles(
    model: Any, dtype: torch.dtype = torch.float32, given: Callable[..., Any] = inputs, fullgraph: bool = True
) -> None:
    """Checks that a model computes the same compiled, in evaluation and in training."""
    compiled: Any = torch.compile(model, fullgraph=fullgraph)
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    for training in (False, True):
        model.train(training)
        expected = computed(model, model, given(dtype, training))
        found = computed(model, compiled, given(dtype, training))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            difference = (found[name].float() - value.float()).abs().max()
            assert difference <= tolerance * max(1, value.float().abs().max()), (name, training, difference)


all_of_it = pytest.mark.compiled


def passes_to_try() -> list[tuple[str, ...]]:
    return [(), *((name,) for name in ALL_PASSES), ALL_PASSES]


# a part of it that is tried in each run of the tests


def test_few_layers_compute_the_same_compiled() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(Few(), LoraConfig(r=2, lora_alpha=5, target_modules=FEW, init_lora_weights=False))
    model.add_adapter("dora", LoraConfig(r=2, lora_alpha=7, target_modules=["linear"], use_dora=True))
    perturb(model)
    model.set_adapter(["default", "dora"])
    optimize(model, ["inplace_addmm", "flattened_rows"])
    assert_compiles(model)


def test_each_model_of_a_process_is_compiled() -> None:
    """A process compiles the code of a function for eight models, and runs it as it is for all others."""
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    for size in range(2, 14):
        code = forward_of_a_part.__code__.replace(co_name=f"forward_{size}")
        cls = type(f"Model{size}", (nn.Sequential,), {"forward": FunctionType(code, globals())})
        model = get_peft_model(cls(nn.Linear(size, size)), LoraConfig(r=2, target_modules=["0"]))
        torch.compile(model, backend=backend)(torch.randn(3, size))
    assert len(graphs) == 12
    assert not any("SymInt" in code for code in graphs), "the sizes of one model don't make those of another dynamic"


def forward_of_a_part(self: nn.Sequential, x: Tensor) -> Tensor:
    return self[0](x)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [torch.compile, nn.Module.compile], ids=["wrapped", "own"])
def test_a_module_inside_that_was_compiled_before_has_what_adapters_make_of_it(wrap: Callable[..., Any]) -> None:
    child: Any = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    model: Any = nn.Sequential(nn.Linear(6, 6), wrap(child, backend="eager") or child).eval()
    x = torch.randn(3, 6)
    base = model(x)
    options: dict[str, Any] = {"r": 2, "target_modules": r".*\.1$", "init_lora_weights": False}
    get_peft_model(model, LoraConfig(lora_alpha=5, **options))
    adapted = model(x)
    assert not torch.allclose(adapted, base, atol=1e-2)
    for _ in range(2):
        model.merge_adapter()
        assert_close(model(x), adapted)
        model.unmerge_adapter()
        assert_close(model(x), adapted)
        with model.disable_adapter():
            assert_close(model(x), base)
    assert_close(model.merge_and_unload()(x), adapted)


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_a_compiled_model_is_the_base_model_after_its_adapters_are_taken_off(how: str) -> None:
    model: Any = get_peft_model(Few(), LoraConfig(r=2, lora_alpha=5, target_modules=FEW, init_lora_weights=False))
    compiled, given = torch.compile(model, backend="eager"), inputs()
    compiled(*given)
    call = model.__call__
    getattr(model, how)()
    assert type(model) is Few
    for found in (compiled(*given), call(*given)):
        for one, other in zip(found, model(*given), strict=True):
            assert_close(one, other)


# the whole


@all_of_it
@pytest.mark.parametrize("passes", passes_to_try(), ids=lambda names: "+".join(names) or "plain")
@pytest.mark.parametrize("name", METHODS)
def test_a_method_at_each_kind_of_layer(name: str, passes: tuple[str, ...]) -> None:
    method = METHODS[name]
    assert_compiles(method.adapted(passes=passes), method.dtype)


@all_of_it
@pytest.mark.parametrize("passes", passes_to_try(), ids=lambda names: "+".join(names) or "plain")
@pytest.mark.parametrize("name", ["plain", "dropout", "dora", "cast-dropout"])
def test_a_method_in_a_flat_graph(name: str, passes: tuple[str, ...]) -> None:
    method = METHODS[name]
    assert_compiles(method.adapted(True, passes), method.dtype)


@all_of_it
def test_an_adapter_for_each_call() -> None:
    assert_compiles(PER_CALL.adapted(flat=True))


@all_of_it
@pytest.mark.parametrize("need_weights", [False, True])
def test_an_attention(need_weights: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["attention"], init_lora_weights=False)
    model = get_peft_model(Attending(need_weights), config)
    # its own code runs on the changed weights, outside of the compiled graph
    assert_compiles(model, given=lambda dtype, grad: (inputs(dtype, grad)[1],), fullgraph=False)


@all_of_it
@pytest.mark.parametrize("order", [("plain", "dora"), ("dora", "plain"), ("dora", "other")], ids=" then ".join)
def test_several_active_adapters(order: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model: Any = Layers()
    for number, name in enumerate(("plain", "dora", "other")):
        config = LoraConfig(
            r=2 + number,
            lora_alpha=5,
            lora_dropout=0.4,
            target_modules=[*ROWS, *CONVOLUTIONS, "w"],
            use_dora=name != "plain",
            init_lora_weights=False,
        )
        get_peft_model(model, config, name) if not number else model.add_adapter(name, config)
    model.set_adapter(list(order))
    assert_compiles(model)


@all_of_it
def test_rows_with_different_adapters() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(Few(), LoraConfig(r=2, lora_alpha=5, target_modules=FEW, init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=8, target_modules=FEW, init_lora_weights=False))
    names = ["other", "__base__", "default", "other"]
    compiled: Any = torch.compile(model)
    rows, *_ = inputs()
    for given in (rows, rows[:, None]):
        with torch.no_grad(), model.mixed_batch(names):
            found, expected = compiled.linear(given), model.linear(given)
        assert_close(found, expected, 1e-5)


@all_of_it
def test_a_scale_that_changes_is_the_scale_of_the_next_call() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(Few(), LoraConfig(r=2, lora_alpha=5, target_modules=FEW, init_lora_weights=False))
    for name, alpha in (("strong", 40), ("weak", 0.1), ("negative", -3)):
        model.add_adapter(name, LoraConfig(r=2, lora_alpha=alpha, target_modules=FEW, init_lora_weights=False))
    compiled: Any = torch.compile(model, fullgraph=True)
    for name in ("default", "strong", "weak", "negative", "default"):
        model.set_adapter(name)
        with torch.no_grad():
            for found, expected in zip(compiled(*inputs()), model(*inputs()), strict=True):
                assert_close(found, expected, 1e-5)


PROMPTS: dict[str, Any] = {
    "prompts": graphpeft.PromptTuningConfig,
    "mlp": functools.partial(graphpeft.PromptEncoderConfig, encoder_hidden_size=8),
    "prefix": functools.partial(graphpeft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=8),
    "context": functools.partial(graphpeft.CPTConfig, cpt_token_ids=[5, 6], cpt_tokens_type_mask=[1, 3]),
}


@all_of_it
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_in_front_of_a_language_model(name: str) -> None:
    options = {} if name == "context" else {"num_virtual_tokens": 3}
    model: Any = get_peft_model(LLAMA.build(), PROMPTS[name](task_type=TaskType.CAUSAL_LM, **options))
    perturb(model)
    compiled: Any = torch.compile(model)
    text = {"input_ids": torch.arange(3, 13).view(2, 5), "use_cache": False}
    for training in (False, True):
        model.train(training)
        assert_close(result(compiled(**text)), result(model(**text)), 1e-4)


@all_of_it
def test_an_export_that_is_compiled_ahead_of_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(Few(), LoraConfig(r=2, lora_alpha=5, target_modules=FEW, init_lora_weights=False))
    # which runs what it has written, and compares
    graphpeft.export(model.eval(), inputs(), tmp_path / "model.pt2", "aoti", "baked")


class _OwnWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x)) @ self.weight


def test_the_first_call_of_a_compiled_model_can_be_a_mixed_batch():
    torch.compiler.reset()
    torch.manual_seed(0)
    options: dict[str, Any] = {"init_lora_weights": False}
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["weight", "linear"], **options)
    model = get_peft_model(_OwnWeight().eval(), config, "one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=5, target_modules=["linear"], **options))
    x, names = torch.randn(3, 6), ["one", "__base__", "two"]
    counters.clear()
    found = torch.compile(model, backend="aot_eager")(x, adapter_names=names)
    # what works out how the rows run would be another two hundred
    assert counters["frames"]["total"] < 100
    assert_close(found, model(x, adapter_names=names))
