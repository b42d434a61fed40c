"""Adapted models under ``torch.compile`` with its default backend compute what they compute without it.

One model holds a layer of each kind, so that one compilation tries them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

import graphpeft
from graphpeft import LoraConfig, get_peft_model, optimize, trace
from graphpeft.passes import PASSES

ALL_PASSES = tuple(each.name for each in PASSES)


@pytest.fixture(autouse=True)
def _compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles anew, and draws the random numbers that are drawn without a compiler."""
    torch.compiler.reset()
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch.compiler.reset()


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
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.w, self.table = nn.Parameter(torch.randn(8, 6) / 3), nn.Parameter(torch.randn(9, 6) / 3)
        self.experts = nn.Parameter(torch.randn(2, 8, 6) / 3)

    def forward(self, rows: Tensor, stack: Tensor, image: Tensor, volume: Tensor, tokens: Tensor) -> list[Tensor]:
        values = []
        for x in (rows, stack):
            values += [self.linear(x), self.without_bias(x), self.flipped(x), self.rounded(x), F.linear(x, self.w)]
        values += [self.sequence(image.flatten(2)), self.image(image), self.volume(volume), self.upwards(image)]
        for ids in (tokens[0], tokens):
            values += [self.head(torch.tanh(self.embedding(ids))), F.embedding(ids, self.table)]
        values += [self.attention(stack, stack, stack, need_weights=False)[0]]
        values += [torch.einsum("bti,eoi->bto", stack, self.experts)]
        return values


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
    "plain": Method([*ROWS, *CONVOLUTIONS, *PARAMETERS, "embedding", "attention", "rounded"], {}),
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


def assert_compiles(model: Any, dtype: torch.dtype = torch.float32) -> None:
    """Checks that a model computes the same compiled, in evaluation and in training."""
    compiled: Any = torch.compile(model, fullgraph=True)
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    for training in (False, True):
        model.train(training)
        expected = computed(model, model, inputs(dtype, training))
        found = computed(model, compiled, inputs(dtype, training))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            difference = (found[name].float() - value.float()).abs().max()
            assert difference <= tolerance * max(1, value.float().abs().max()), (name, training, difference)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_at_each_kind_of_layer(name: str) -> None:
    assert_compiles(METHODS[name].adapted(), METHODS[name].dtype)
