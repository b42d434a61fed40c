"""First values of A and B that are computed from the weight W, (out, in).

    pissa       W = U S Vᵀ:   B = U_r √(S_r/s),  A = √(S_r/s) V_rᵀ,        W becomes W − s B A
    olora       W = Q R:      B = Q_r,           A = R_r,                  W becomes W − s B A
    mica        W = U S Vᵀ:   B = the last r columns of U, never trained,  A = 0
    orthogonal  A and B random, with B A = 0
    loftq       Q₀ = q(W); loftq_iter times:  B A = the best product of rank r for W − Q,  Q = q(W − B A);
                W becomes the last Q for which B A was computed

s is the scale of the branch and r its rank. LoftQ's q rounds to 4 or 8 bits and back: with 4 bits, blocks of 64
elements are divided by their largest one and rounded to one of the 16 values of NormalFloat; with 8, rows in half
precision are rounded to one of the 255 values k / 127. LoftQ ignores the scale of the branch, as in PEFT.

Sources: Meng et al., "PiSSA", arXiv 2404.02948; Büyükakyüz, "OLoRA", arXiv 2406.01775; "MiCA", arXiv 2604.01694;
https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation; Li et al., "LoftQ", arXiv 2310.08659,
algorithm 1; Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E. The same numbers as PEFT's
``tuners/lora/layer.py`` and ``utils/loftq_utils.py``, which rounds by bitsandbytes, but for OLoRA of a weight that is
stored as (in, out): PEFT decomposes it as it is stored, which gives factors of other shapes than its A and B; here W is
decomposed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphpeft.methods.lora.init.base import InitContext, InitialFactors, Initialisation, rank_refusal
from graphpeft.rules.options import Steps, check_options


@dataclass(frozen=True)
class Pissa(Initialisation):
    """The principal singular vectors.

    Attributes:
        iterations: The number of steps that approximate them; None for an exact decomposition.
    """

    iterations: int | None = None

    replaces_weight = subtracts_product = True

    def refusal(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank above the weight's, and a scale without a root."""
        if scaling <= 0:
            return "pissa divides by the scale; make lora_alpha positive"
        return rank_refusal(shape, rank)

    def first(self, context: InitContext) -> InitialFactors:
        """Returns the first r singular vectors, with the root of the singular value in each factor."""
        rank = context.rank
        if self.iterations is None:
            U, S, Vt = torch.linalg.svd(context.weight, full_matrices=False)
            U, S, Vt = U[:, :rank], S[:rank], Vt[:rank]
        else:
            U, S, V = torch.svd_lowrank(context.weight, rank, niter=self.iterations)
            Vt = V.t()
        root = torch.diag(torch.sqrt(S / context.scaling))
        return context.subtracting(root @ Vt, U @ root)


@dataclass(frozen=True)
class Olora(Initialisation):
    """An orthonormal basis of the weight's first columns."""

    replaces_weight = subtracts_product = True

    def first(self, context: InitContext) -> InitialFactors:
        """Returns the first rows and columns of a QR decomposition."""
        Q, R = torch.linalg.qr(context.weight)
        return context.subtracting(R[: context.rank], Q[:, : context.rank])


@dataclass(frozen=True)
class Mica(Initialisation):
    """The minor singular vectors as B, which isn't trained."""

    trains_b = False

    def first(self, context: InitContext) -> InitialFactors:
        """Returns zero, and the last singular vectors."""
        zero = context.weight.new_zeros(context.rank, context.weight.shape[1])
        return InitialFactors(zero, minor_directions(context.weight, context.rank))


@dataclass(frozen=True)
class Orthogonal(Initialisation):
    """Random factors whose product is zero, though neither is."""

    def refusal(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank that can't be halved."""
        return f"orthogonal halves the rank, and {rank} is odd; choose an even r" if rank % 2 else None

    def first(self, context: InitContext) -> InitialFactors:
        """Draws each factor in the span of one half of an orthonormal basis."""
        rank, (rows, columns) = context.rank, context.weight.shape
        Q, _ = torch.linalg.qr(torch.randn(rank, rank))
        A = (torch.randn(columns, rank // 2) @ Q[0::2]).T / 10.0
        B = (torch.randn(rank // 2, rows).T @ Q[1::2]) / 10.0
        return InitialFactors(A, B)


def minor_directions(weight: Tensor, rank: int) -> Tensor:
    """Returns the left singular vectors of the `rank` smallest singular values, as columns."""
    U, _, _ = torch.linalg.svd(weight, full_matrices=False)
    return U[:, -rank:]


# LoftQ

_BLOCK = 64
_LARGEST_QUANTILE = 0.9677083
"""Of the normal distribution: the mean of 1 − 1/32 and 1 − 1/30, since one sign has 8 values and the other 7."""


@dataclass
class LoftQConfig:
    """The options of LoftQ; the names, defaults and meanings are PEFT's.

    Attributes:
        loftq_bits: The bits of the rounded weight: 4 or 8.
        loftq_iter: How often the rounding and the factors are fitted to each other: 1 to 100.

    Raises:
        ValueError: For other values.

    Examples:
        >>> config = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=8))
    """

    loftq_bits: int = 4
    loftq_iter: Steps = 1

    def __post_init__(self) -> None:
        check_options(self)
        if self.loftq_bits not in (4, 8):
            raise ValueError(f"loftq_bits must be 4 or 8, as in PEFT, not {self.loftq_bits!r}")


@dataclass(frozen=True)
class Loftq(Initialisation):
    """The principal singular vectors of the rounding error."""

    replaces_weight = True

    def first(self, context: InitContext) -> InitialFactors:
        """Returns A and B, with the root of the singular value in each, and the rounded weight."""
        options: LoftQConfig = context.config.loftq_config
        rounded = _rounded_to_4_bits if options.loftq_bits == 4 else _rounded_to_8_bits
        weight, rank = context.weight, context.rank
        A, B, residual = weight.new_zeros(rank, 1), weight.new_zeros(1, rank), weight
        for _ in range(options.loftq_iter):
            residual = rounded(weight - B @ A)
            U, S, Vt = torch.linalg.svd(weight - residual, full_matrices=False)
            root = torch.diag(S[:rank].sqrt())
            A, B = root @ Vt[:rank], U[:, :rank] @ root
        return InitialFactors(A, B, residual)


def _rounded_to_4_bits(weight: Tensor) -> Tensor:
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    values = _normal_float().to(weight.device)
    between = (values[1:] + values[:-1]) / 2
    nearest = torch.bucketize(blocks / _not_zero(largest), between)
    return (values[nearest] * largest).flatten()[: len(flat)].view_as(weight)


def _rounded_to_8_bits(weight: Tensor) -> Tensor:
    half = weight.half().float()
    largest = half.abs().amax(dim=1, keepdim=True)
    steps = torch.round(half * (127 / _not_zero(largest)))
    return steps * largest / 127


def _not_zero(largest: Tensor) -> Tensor:
    return torch.where(largest == 0, 1, largest)


@functools.cache
def _normal_float() -> Tensor:
    """Returns the 16 values of NormalFloat: quantiles of the normal distribution, from −1 to 1, with 0 among them."""
    positive = torch.special.ndtri(torch.linspace(_LARGEST_QUANTILE, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(_LARGEST_QUANTILE, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    return (values / values.max()).float()
