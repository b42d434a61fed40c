"""Generated models of all kinds of layers and weights, with their inputs: hypothesis strategies for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

DIM = 8
WORDS = 11


class Functional(nn.Module):
    """A weight used functionally, in one of the spellings of a linear operation."""

    def __init__(self, spelling: str, bias: bool):
        super().__init__()
        self.spelling = spelling
        shape = (DIM, DIM)
        self.w = nn.Parameter(torch.randn(shape) / DIM**0.5)
        self.b = nn.Parameter(torch.randn(DIM)) if bias else None

    def forward(self, x):
        y = SPELLINGS[self.spelling](x, self.w)
        return y if self.b is None else y + self.b


SPELLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "F.linear": lambda x, w: F.linear(x, w),
    "F.linear by keyword": lambda x, w: F.linear(input=x, weight=w),
    "x @ w": lambda x, w: x @ w,
    "x @ w.T": lambda x, w: x @ w.T,
    "matmul w.t()": lambda x, w: torch.matmul(x, w.t()),
    "matmul w.transpose": lambda x, w: x.matmul(w.transpose(0, 1)),
    "permute by keyword": lambda x, w: x @ w.permute(dims=(1, 0)),
    "torch.t by keyword": lambda x, w: x @ torch.t(input=w),
    "transpose by keyword": lambda x, w: x @ w.transpose(dim0=0, dim1=1),
    "einsum from the left": lambda x, w: torch.einsum("oi,bti->bto", w, x),
    "w.mT.mT": lambda x, w: x @ w.mT.mT,
    "einsum": lambda x, w: torch.einsum("bti,oi->bto", x, w),
    "einsum transposed": lambda x, w: torch.einsum("...i,io->...o", x, w),
    "addmm": lambda x, w: torch.addmm(torch.zeros(DIM, dtype=w.dtype), x.reshape(-1, DIM), w).view(*x.shape[:-1], DIM),
    "aten": lambda x, w: torch.ops.aten.linear.default(x, w),
}


class Doubled(nn.Linear):
    """A subclass of nn.Linear with a forward of its own."""

    def forward(self, input):
        return 2 * F.linear(input, self.weight, self.bias)


class TwoWeights(nn.Module):
    """Several weights in one module, one of them used twice, beside a layer."""

    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.randn(DIM, DIM) / DIM**0.5)
        self.w = nn.Parameter(torch.randn(DIM, DIM) / DIM**0.5)
        self.inner = nn.Linear(DIM, DIM)

    def forward(self, x):
        h = torch.tanh(F.linear(x, self.w))
        return self.inner(F.linear(h, self.w) + x @ self.v)


class Reader(nn.Module):
    """A weight of another module, used functionally."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.w = layer.weight

    def forward(self, x):
        return F.linear(x, self.w)


class Tied(nn.Module):
    """A layer that shares its weight with another module."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.reader = Reader(self.inner)

    def forward(self, x):
        return self.reader(torch.tanh(self.inner(x)))


class Convolved(nn.Module):
    """A convolution over tokens."""

    def __init__(self, groups: int, bias: bool):
        super().__init__()
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1, groups=groups, bias=bias)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Residual(nn.Module):
    # the part is not named body, as the one is in front of which prompts stand
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x, scale=1.0):
        return x + scale * self.inner(self.norm(x))


class Repeated(nn.Module):
    """One module called several times."""

    def __init__(self, inner: nn.Module, times: int):
        super().__init__()
        self.inner = inner
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.inner(x))
        return x


class Looped(nn.Module):
    """A loop over a module list, and one over a module dict."""

    def __init__(self, bodies: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(bodies)
        self.named = nn.ModuleDict({"last": nn.Linear(DIM, DIM, bias=False)})

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x)
        if mask is not None:
            x = x.masked_fill(mask[..., None], 0.0)
        for layer in self.named.values():
            x = layer(x)
        return x


class FunctionalDropout(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        return F.dropout(x, self.p, training=self.training)


class Branching(nn.Module):
    """A weight used functionally, by code that differs between training and evaluation."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(DIM, DIM) / DIM**0.5)

    def forward(self, x):
        return F.dropout(F.linear(x, self.w), 0.3) if self.training else torch.matmul(x, self.w.T)


class InPlace(nn.Module):
    """Item assignment and in-place operations."""

    def forward(self, x):
        y = x * 1
        y[:, 0] = 0.5
        y.add_(1)
        return y


class Reshaped(nn.Module):
    """Arithmetic on shapes, as in attention heads."""

    def forward(self, x):
        batch, tokens = x.shape[:2]
        heads = x.view(batch, tokens, 2, -1).transpose(1, 2)
        scores = F.softmax(heads @ heads.mT / heads.size(-1) ** 0.5, dim=-1)
        return (scores @ heads).transpose(1, 2).reshape(batch, tokens, -1)


class OfTokens(nn.Module):
    """A body between an embedding and a head, which can be tied to it."""

    def __init__(self, body: nn.Module, is_tied: bool):
        super().__init__()
        self.embed = nn.Embedding(WORDS, DIM)
        self.body = body
        self.head = nn.Linear(DIM, WORDS)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


class Model(nn.Module):
    """A generated model: a body, and a head whose output is returned alone or in a container."""

    def __init__(self, body: nn.Module, output: str):
        super().__init__()
        self.body = body
        self.head = nn.Linear(DIM, 3)
        self.output = output

    def forward(self, x, *, offset=0.0):
        h = self.body(x)
        y = self.head(h) + offset
        return {"alone": lambda: y, "dict": lambda: {"y": y, "h": h}, "tuple": lambda: (y, h)}[self.output]()


# cached, since hypothesis analyses each new strategy, and each example would create one
@functools.cache
def bodies() -> st.SearchStrategy[Callable[[], nn.Module]]:
    """Returns a strategy for functions that build a module from (batch, tokens, DIM) to the same shape."""
    leaves = st.one_of(
        st.booleans().map(lambda bias: lambda: nn.Linear(DIM, DIM, bias=bias)),
        st.just(lambda: Doubled(DIM, DIM)),
        st.sampled_from([TwoWeights, Branching]),
        st.builds(lambda g, b: lambda: Convolved(g, b), st.sampled_from([1, 2]), st.booleans()),
        st.builds(lambda s, b: lambda: Functional(s, b), st.sampled_from(sorted(SPELLINGS)), st.booleans()),
        st.sampled_from([nn.GELU, lambda: nn.LayerNorm(DIM), lambda: nn.Dropout(0.3), InPlace, Reshaped]),
        st.floats(0.1, 0.6).map(lambda p: lambda: FunctionalDropout(p)),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            inner.map(lambda build: lambda: Residual(build())),
            st.lists(inner, min_size=1, max_size=3).map(lambda bs: lambda: nn.Sequential(*[b() for b in bs])),
            st.lists(inner, min_size=1, max_size=3).map(lambda bs: lambda: Looped([b() for b in bs])),
            st.builds(lambda b, times: lambda: Repeated(b(), times), inner, st.integers(1, 3)),
        ),
        max_leaves=5,
    )


@dataclass(frozen=True)
class Case:
    """A generated model: a function that builds it, and inputs."""

    build: Callable[[], nn.Module]
    inputs: tuple[torch.Tensor, ...]
    others: tuple[tuple[torch.Tensor, ...], ...]

    def __repr__(self) -> str:
        return repr(self.build())


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """Returns a case whose model and inputs have another dtype."""
    inputs, *others = (
        tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in given)
        for given in (case.inputs, *case.others)
    )
    return Case(lambda: case.build().to(dtype), inputs, tuple(others))


@functools.cache
def mixing_cases() -> st.SearchStrategy[Case]:
    """Returns a strategy for models, as `cases` does, whose body mixes all tokens."""
    return cases(bodies().map(lambda build: lambda: nn.Sequential(Reshaped(), build())))


@functools.cache
def tied_cases() -> st.SearchStrategy[Case]:
    """Returns a strategy for models, as `cases` does, with two modules that share a weight."""
    return cases(bodies().map(lambda build: lambda: nn.Sequential(Tied(), build())))


@st.composite
def token_cases(draw: Any) -> Case:
    """Returns a strategy for models of tokens, with inputs, and other inputs of another batch size and length."""
    body, is_tied, seed = draw(bodies()), draw(st.booleans()), draw(st.integers(0, 3))

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return OfTokens(body(), is_tied)

    generator = torch.Generator().manual_seed(seed)
    # each word, so that whichever is trained learns
    inputs = torch.cat([torch.randperm(WORDS, generator=generator), torch.zeros(1, dtype=torch.int64)]).view(2, 6)
    others = [torch.randint(WORDS, shape, generator=generator) for shape in ((1, 5), (3, 1))]
    return Case(build, (inputs,), tuple((other,) for other in others))


@st.composite
def cases(draw: Any, of_bodies: st.SearchStrategy[Callable[[], nn.Module]] | None = None) -> Case:
    """Returns a strategy for models with inputs, and other inputs of another batch size and length."""
    body, output = draw(bodies() if of_bodies is None else of_bodies), draw(st.sampled_from(["alone", "dict", "tuple"]))
    seed = draw(st.integers(0, 3))

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return Model(body(), output)

    generator = torch.Generator().manual_seed(seed)
    inputs, *others = ((torch.randn(b, t, DIM, generator=generator),) for b, t in ((2, 3), (1, 5), (3, 1)))
    return Case(build, inputs, tuple(others))


def targets_of(model: nn.Module) -> list[str]:
    """Returns the paths of all linear layers and matrices in a generated model."""
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return layers + [path for path, _ in model.named_parameters() if path.rpartition(".")[2] in ("w", "v")]
