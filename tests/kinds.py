"""A small model for each kind of weight that an adapter may change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from oracle import CONV_1D, CONV_2D, CONV_3D, EMBEDDING, GROUPED, LINEAR, TRANSPOSED, Case
from torch import Tensor, nn


class Matrix(nn.Module):
    """A matrix that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w)


class Added(Matrix):
    """The same with a bias in one operation, which is a parameter or computed."""

    def __init__(self, is_computed: bool) -> None:
        super().__init__()
        self.b, self.is_computed = nn.Parameter(torch.randn(8)), is_computed

    def forward(self, x: Tensor) -> Tensor:
        b = self.b.sum(0) if self.is_computed else self.b
        return torch.addmm(b, x.flatten(0, 1), self.w).unflatten(0, x.shape[:2]).tanh()


class BothWays(nn.Module):
    """A matrix, by which the model multiplies, and by whose transpose."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, features) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ self.w.T


class Stack(nn.Module):
    """A matrix for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eio->bto", x, self.w).tanh()


class Kernels(nn.Module):
    """Weights that no one matrix is: kernels of three dimensions, paddings, stacks, and plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.solid = nn.Conv3d(2, 4, 2, padding=1, padding_mode="circular")
        self.grouped = nn.Conv1d(4, 6, 3, groups=2, dilation=2)
        self.up = nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.w = nn.Parameter(torch.randn(4, 5))
        self.experts = nn.Parameter(torch.randn(2, 5, 7) / 3)
        self.kernel = nn.Parameter(torch.randn(3, 7, 3, 1) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.solid(x)).flatten(2)
        x = torch.tanh(self.up(torch.tanh(self.grouped(x)))).mT @ self.w
        x = torch.tanh(torch.bmm(x, self.experts)).mT[..., None]
        return nn.functional.conv2d(x, self.kernel * torch.sigmoid(x.mean()))


class Dropping(nn.Sequential):
    """Layers of all kinds that PEFT adapts, with dropout of the model's own between them."""

    def __init__(self) -> None:
        layers = (nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(2), nn.Dropout(0.3), nn.Conv1d(6, 8, 1), nn.Linear(9, 5))
        super().__init__(*layers)


class Attention(nn.Module):
    """PyTorch's attention, which has its projections' weights as one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Rounded(nn.Module):
    """A linear layer whose weight is no floating-point number."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 8
        self.register_buffer("numbers", torch.randint(-4, 4, (8, 6), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.numbers.float() / 8)  # type: ignore[operator]


VECTORS = (4, 3, 6)
WEIGHT = {"target_modules": ["0.w"]}
MATRIX = Case("matrix", lambda: nn.Sequential(Matrix()), lambda: (torch.randn(VECTORS),), WEIGHT)
ADDED = Case("added", lambda: nn.Sequential(Added(False)), lambda: (torch.randn(VECTORS),), WEIGHT)
COMPUTED = Case("computed-bias", lambda: nn.Sequential(Added(True)), lambda: (torch.randn(VECTORS),), WEIGHT)
BOTH_WAYS = [
    Case(f"both-ways-{n}", lambda n=n: nn.Sequential(BothWays(n)), lambda: (torch.randn(VECTORS),), WEIGHT)
    for n in (6, 8)
]
KERNELS = Case(
    "kernels",
    Kernels,
    lambda: (torch.randn(2, 2, 2, 3, 4),),
    {"target_modules": ["solid", "grouped", "up", "w", "experts", "kernel"]},
)
STACK = Case("stack", lambda: nn.Sequential(Stack()), lambda: (torch.randn(VECTORS),), WEIGHT)
ATTENTION = Case("attention", Attention, lambda: (torch.randn(4, 3, 8),), {"target_modules": ["attention"]})
ROUNDED = Case("rounded", lambda: nn.Sequential(Rounded(), nn.Tanh()), lambda: (torch.randn(VECTORS),))


class Kind(NamedTuple):
    """A kind of weight.

    Attributes:
        name: What the docs call it.
        case: A model that has one.
        merges: Whether an adapter can be merged into it.
    """

    name: str
    case: Case
    merges: bool = True


KINDS = [
    Kind("`Linear`", LINEAR),
    Kind("Transformers' `Conv1D`", TRANSPOSED),
    Kind("`Conv1d`", CONV_1D),
    Kind("`Conv2d`", CONV_2D),
    Kind("`Conv3d`", CONV_3D),
    Kind("grouped", GROUPED, merges=False),
    Kind("`Embedding`", EMBEDDING),
    Kind("`MultiheadAttention`", ATTENTION),
    Kind("plain matrix", MATRIX),
    Kind("experts", STACK),
    Kind("quantised", ROUNDED, merges=False),
]
