"""First values of A and B that come from the weight W, (out, in), instead of chance.

    pissa       W = U S Vᵀ:   B = U_r √(S_r/s),  A = √(S_r/s) V_rᵀ,        W becomes W − s B A
    olora       W = Q R:      B = Q_r,           A = R_r,                  W becomes W − s B A
    mica        W = U S Vᵀ:   B = the last r columns of U, never trained,  A = 0
    orthogonal  A and B random, with B A = 0

s is the scale of the branch and r its rank. Sources: Meng et al., "PiSSA", arXiv
2404.02948; Büyükakyüz, "OLoRA", arXiv 2406.01775; "MiCA", arXiv 2604.01694;
https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation. The numbers are those of PEFT's
``tuners/lora/layer.py``, but for OLoRA of a weight that is stored as (in, out): PEFT decomposes it as it is stored,
which fits no A and B of its own; here it is W that is decomposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphpeft.methods.lora.beginning import Beginning, First, refused_rank, taken_from


@dataclass(frozen=True)
class Pissa:
    """The principal singular vectors.

    Attributes:
        iterations: How many steps approximate them; None for all singular values, exactly.
    """

    iterations: int | None = None
    replaces_weight = takes_product = True
    b_is_trained = True
    is_measured = False

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank beyond the weight's, and a scale without a root."""
        if scaling <= 0:
            return "pissa divides by the scale; make lora_alpha positive"
        return refused_rank(shape, rank)

    def first(self, given: Beginning) -> First:
        """Returns the r first singular vectors, each with a half of its singular value."""
        if self.iterations is None:
            U, S, Vt = torch.linalg.svd(given.weight, full_matrices=False)
            U, S, Vt = U[:, : given.rank], S[: given.rank], Vt[: given.rank]
        else:
            U, S, V = torch.svd_lowrank(given.weight, given.rank, niter=self.iterations)
            Vt = V.t()
        root = torch.diag(torch.sqrt(S / given.scaling))
        return taken_from(given, root @ Vt, U @ root)


@dataclass(frozen=True)
class Olora:
    """An orthonormal basis of the weight's first columns."""

    replaces_weight = takes_product = True
    b_is_trained = True
    is_measured = False

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank beyond the weight's."""
        return refused_rank(shape, rank)

    def first(self, given: Beginning) -> First:
        """Returns the first rows and columns of a QR decomposition."""
        Q, R = torch.linalg.qr(given.weight)
        return taken_from(given, R[: given.rank], Q[:, : given.rank])


@dataclass(frozen=True)
class Mica:
    """The minor singular vectors, of which A alone learns a use."""

    replaces_weight = takes_product = False
    b_is_trained = False
    is_measured = False

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank beyond the weight's."""
        return refused_rank(shape, rank)

    def first(self, given: Beginning) -> First:
        """Returns zero, and the last singular vectors."""
        zero = given.weight.new_zeros(given.rank, given.weight.shape[1])
        return First(zero, minor_directions(given.weight, given.rank))


@dataclass(frozen=True)
class Orthogonal:
    """Random factors whose product is zero, though neither is."""

    replaces_weight = takes_product = False
    b_is_trained = True
    is_measured = False

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank that can't be halved."""
        return f"orthogonal halves the rank, and {rank} is odd; choose an even r" if rank % 2 else None

    def first(self, given: Beginning) -> First:
        """Draws both in the span of two halves of one orthonormal basis."""
        rows, columns = given.weight.shape
        Q, _ = torch.linalg.qr(torch.randn(given.rank, given.rank))
        A = (torch.randn(columns, given.rank // 2) @ Q[0::2]).T / 10.0
        B = (torch.randn(given.rank // 2, rows).T @ Q[1::2]) / 10.0
        return First(A, B)


def minor_directions(weight: Tensor, rank: int) -> Tensor:
    """Returns the left singular vectors of the smallest singular values, as columns."""
    U, _, _ = torch.linalg.svd(weight, full_matrices=False)
    return U[:, -rank:]
