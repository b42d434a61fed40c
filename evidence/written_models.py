"""Small models, each with one thing that the Python code of a forward may do."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import wavenet
from case import Case
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

WIDTH = 16
_FORWARDS: list[Callable[..., Any]] = []


class Recomputed(nn.Module):
    """Computes a part again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        """Computes it under a checkpoint."""
        return checkpoint(self.layer, x, use_reentrant=False)


class Written(nn.Module):
    """What the forwards use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.named = nn.ModuleDict({"one": nn.Linear(WIDTH, WIDTH), "two": nn.Linear(WIDTH, WIDTH)})
        self.block = nn.Sequential(OrderedDict(norm=nn.LayerNorm(WIDTH), act=nn.GELU(), out=nn.Linear(WIDTH, WIDTH)))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.convolution, self.normal = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH)
        self.table, self.dropout = nn.Embedding(32, WIDTH), nn.Dropout(0.2)
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.normed = weight_norm(nn.Linear(WIDTH, WIDTH))
        self.w, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4), nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.recomputed = Recomputed()
        self.scale, self.cache, self.options = 0.5, {}, {"depth": 2, "act": F.silu}

    @property
    def half_scale(self) -> float:
        """A number that is computed."""
        return self.scale / 2

    @staticmethod
    def squared(x: Tensor) -> Tensor:
        """Computes without the module."""
        return x * x

    def shifted(self, x: Tensor, by: float = 1.0, *, twice: bool = False) -> Tensor:
        """Computes with optional arguments."""
        return x + (2 * by if twice else by) * self.bias


@dataclasses.dataclass
class Output:
    """What a forward returns."""

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


Pair = namedtuple("Pair", ["left", "right"])


class Doubled(torch.autograd.Function):
    """Has a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Doubles."""
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Gives three times the gradient, as no derivation would."""
        return gradient * 3


def written(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a model of a forward."""
    _FORWARDS.append(forward)
    return forward


def cases() -> Iterator[Case]:
    """Yields the models."""
    for forward in _FORWARDS:
        yield Case("hand-written", forward.__name__, functools.partial(_built, forward), _tokens)
    yield Case("hand-written", "WaveNet", wavenet.WaveNet, _samples)


def _built(forward: Callable[..., Any]) -> nn.Module:
    return type("Model", (Written,), {"forward": forward, "__module__": __name__})()


def _tokens(batch: int, scale: float) -> tuple[Tensor, ...]:
    return (torch.randn(batch, int(8 * scale), WIDTH),)


def _samples(batch: int, scale: float) -> tuple[Tensor, ...]:
    return (torch.randint(wavenet.SAMPLES, (batch, int(40 * scale))),)


# branches


@written
def branches_on_training(self: Any, x: Tensor) -> Tensor:
    return self.first(x) if self.training else self.second(x)


@written
def branches_on_a_length(self: Any, x: Tensor) -> Tensor:
    return self.first(x) if x.shape[1] > 4 else self.second(x)


@written
def returns_early(self: Any, x: Tensor) -> Tensor:
    if self.scale > 1:
        return x
    return self.first(x)


@written
def asks_for_types_and_dimensions(self: Any, x: Tensor) -> Tensor:
    if isinstance(x, list | tuple) or x.dim() != 3 or not torch.is_tensor(x):
        raise ValueError("give one tensor of tokens")
    return self.first(x if x.dtype == torch.float32 else x.float())


@written
def chooses_with_and_or_not(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    y = self.first(x)
    return y * mask if mask is not None and not self.training else y


@written
def matches_a_mode(self: Any, x: Tensor, mode: str = "first") -> Tensor:
    match mode:
        case "first":
            return self.first(x)
        case "second":
            return self.second(x)
        case _:
            return x


@written
def chooses_by_where(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    return torch.where(y > 0, y, self.second(x))


@written
def asserts_a_shape(self: Any, x: Tensor) -> Tensor:
    assert x.shape[-1] == WIDTH, f"got {x.shape}"
    return self.first(x)


# loops


@written
def loops_over_layers(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.layers):
        x = x + layer(x) * i
    return x


@written
def loops_over_named_layers(self: Any, x: Tensor) -> Tensor:
    for name, layer in self.named.items():
        x = layer(x) if name == "one" else x + layer(x)
    return x


@written
def loops_while(self: Any, x: Tensor) -> Tensor:
    depth = 0
    while depth < self.options["depth"]:
        x, depth = self.first(x), depth + 1
    return x


@written
def loops_over_tokens(self: Any, x: Tensor) -> Tensor:
    state = x.new_zeros(x.shape[0], WIDTH)
    states = []
    for token in x.unbind(1):
        state = torch.tanh(self.first(token) + self.second(state))
        states.append(state)
    return torch.stack(states, 1)


@written
def breaks_and_continues(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.layers):
        if i == 0:
            continue
        x = layer(x)
        if i == 1:
            break
    return x


@written
def zips_reverses_and_chains(self: Any, x: Tensor) -> Tensor:
    parts = [layer(x) for layer in itertools.chain(self.layers[:1], reversed(self.layers))]
    return sum((a * b for a, b in zip(parts, parts[::-1], strict=True)), start=torch.zeros_like(x))


@written
def reduces(self: Any, x: Tensor) -> Tensor:
    return functools.reduce(lambda y, layer: y + layer(y), self.layers, x)


# arguments and results


@written
def takes_nested_arguments(self: Any, x: Tensor, more: dict[str, Any] | None = None, *rest: Tensor) -> Tensor:
    for extra in rest:
        x = x + extra
    return self.first(x) + (more or {"scale": 1.0})["scale"]


@written
def takes_keywords(self: Any, x: Tensor, *, scale: float = 2.0, **kwargs: Any) -> Tensor:
    return self.shifted(self.first(x), scale, **{"twice": True, **kwargs})


@written
def returns_a_dictionary(self: Any, x: Tensor) -> dict[str, Any]:
    return {"out": self.first(x), "inside": [x * 2, (self.second(x), None)]}


@written
def returns_a_dataclass(self: Any, x: Tensor) -> Output:
    hidden = (self.first(x), self.second(x))
    return Output(sum(hidden[1:], hidden[0]), hidden)


@written
def returns_a_named_tuple(self: Any, x: Tensor) -> Pair:
    return Pair(self.first(x), right=self.second(x))


@written
def unpacks_with_a_star(self: Any, x: Tensor) -> Tensor:
    batch, *rest = x.shape
    head, *tail = self.first(x).split(4, dim=-1)
    return torch.cat([*tail, head], -1).view(batch, *rest)


# shapes


@written
def reshapes(self: Any, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    y = self.first(x).view(batch, length, 4, -1).transpose(1, 2)
    return (y @ y.mT).softmax(-1).reshape(batch, -1)


@written
def computes_with_sizes(self: Any, x: Tensor) -> Tensor:
    half = x.size(1) // 2
    return self.first(x[:, :half]).mean() + self.second(x[:, half:]) / len(x) ** 0.5


@written
def makes_tensors_of_sizes(self: Any, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1], device=x.device)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return self.first(x + self.table(positions)).masked_fill(~mask.any(0)[:, None], 0.0)


@written
def slices_and_indexes(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    return y[:, [0, -1]] + y[:, ::2].sum(1, keepdim=True) + y[..., None].squeeze(-1)[:, :1]


@written
def gathers_and_sorts(self: Any, x: Tensor) -> Tensor:
    values, ids = self.first(x).topk(3, dim=-1)
    return torch.gather(x.sort(-1).values, -1, ids) + values


@written
def contracts_by_einsum(self: Any, x: Tensor) -> Tensor:
    return torch.einsum("bti,oi->bto", x, self.w) + torch.einsum("bti,bsi->bts", x, x).sum(-1, keepdim=True)


# what is written


@written
def assigns_items(self: Any, x: Tensor) -> Tensor:
    y = self.first(x).clone()
    y[:, 0] = 0
    y[y > 1] = 1
    return y


@written
def writes_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    y += 1
    y.mul_(2).clamp_(min=-1)
    return F.relu(y, inplace=True)


@written
def writes_into_views(self: Any, x: Tensor) -> Tensor:
    y = self.first(x) * 1
    left, right = y[..., : WIDTH // 2], y[..., WIDTH // 2 :]
    left.add_(right)
    return y


@written
def changes_a_buffer(self: Any, x: Tensor) -> Tensor:
    if self.training:
        with torch.no_grad():
            self.mean.lerp_(x.mean((0, 1)), 0.1)
    return self.first(x) - self.mean


@written
def keeps_a_cache(self: Any, x: Tensor) -> Tensor:
    if x.shape[1] not in self.cache:
        self.cache[x.shape[1]] = torch.arange(x.shape[1]) / x.shape[1]
    return self.first(x) + self.cache[x.shape[1]][:, None]


@written
def keeps_its_last_output(self: Any, x: Tensor) -> Tensor:
    self.last = self.first(x)
    return self.last * 2


# weights


@written
def uses_weights_functionally(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.w, self.bias) + x @ self.w.T + F.linear(x, self.first.weight)


@written
def uses_a_layer_twice(self: Any, x: Tensor) -> Tensor:
    return self.first(self.first(x))


@written
def normalises_a_weight(self: Any, x: Tensor) -> Tensor:
    return self.normed(x) + F.linear(x, F.normalize(self.w, dim=0))


@written
def attends(self: Any, x: Tensor) -> Tensor:
    y, _ = self.attention(x, x, x, need_weights=False)
    return y + F.scaled_dot_product_attention(self.first(x), x, x, is_causal=True)


@written
def convolves_and_normalises(self: Any, x: Tensor) -> Tensor:
    return self.normal(self.convolution(x.transpose(1, 2))).transpose(1, 2)


@written
def recurs(self: Any, x: Tensor) -> Tensor:
    y, state = self.recurrent(x)
    return self.first(y) + state[-1][:, None]


# calls


@written
def calls_methods_and_properties(self: Any, x: Tensor) -> Tensor:
    return self.squared(self.shifted(self.first(x), twice=True)) * self.half_scale


@written
def calls_closures(self: Any, x: Tensor) -> Tensor:
    def scaled(y: Tensor, by: float = self.scale) -> Tensor:
        return self.first(y) * by

    return (lambda y: scaled(y) + scaled(y, 2))(x)


@written
def calls_by_name(self: Any, x: Tensor) -> Tensor:
    layer, function = ("first", "tanh")
    return getattr(self, layer)(getattr(torch, function)(self.options["act"](x)))


@written
def calls_a_generator(self: Any, x: Tensor) -> Tensor:
    def outputs() -> Iterator[Tensor]:
        for layer in self.layers:
            yield layer(x)

    return torch.stack(list(outputs())).mean(0)


# around calls


@written
def computes_without_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = self.second(x)
    return self.first(x) - target.detach()


@written
def computes_under_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = self.first(x)
    return y.float() + self.second(x)


@written
def recomputes(self: Any, x: Tensor) -> Tensor:
    return self.recomputed(x)


@written
def has_a_gradient_of_its_own(self: Any, x: Tensor) -> Any:
    return Doubled.apply(self.first(x))


@written
def uses_contexts(self: Any, x: Tensor) -> Tensor:
    with contextlib.nullcontext(), contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        return self.first(x)


@written
def tries(self: Any, x: Tensor) -> Tensor:
    try:
        return self.first(x)
    finally:
        self.scale = 0.5


# random numbers


@written
def drops_out(self: Any, x: Tensor) -> Tensor:
    return F.dropout(self.dropout(self.first(x)), 0.1, self.training)


@written
def draws(self: Any, x: Tensor) -> Tensor:
    noise = torch.randn_like(x) if self.training else torch.zeros_like(x)
    return self.first(x + noise * torch.rand(x.shape[0], 1, 1))
