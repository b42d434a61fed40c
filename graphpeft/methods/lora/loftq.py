"""First values that make up for rounding the weight W, (out, in): LoftQ.

    Q₀ = q(W);  then, as often as `loftq_iter` says:  B A = the best product of rank r for W − Q,  Q = q(W − B A)

q rounds to 4 or 8 bits and back. The weight becomes the last Q for which B A was found. With 4 bits, blocks of 64
elements are divided by their largest one and rounded to one of the 16 values of NormalFloat; with 8, rows of half
precision are, to one of the 255 values k / 127. The scale of the branch isn't considered, as in PEFT.

Sources: Li et al., "LoftQ", arXiv 2310.08659, algorithm 1; Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E. The
numbers are those of PEFT's ``utils/loftq_utils.py``, which rounds by bitsandbytes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphpeft.methods.lora.beginning import Beginning, First, refused_rank
from graphpeft.rules.options import Steps, check_options

_BLOCK = 64
_LARGEST_QUANTILE = 0.9677083
"""Of the normal distribution: the mean of 1 − 1/32 and 1 − 1/30, since one sign has 8 values and the other 7."""


@dataclass
class LoftQConfig:
    """How the weight is rounded, and how often its rounding and A and B are fitted to each other.

    Attributes:
        loftq_bits: 4 or 8.
        loftq_iter: How often.

    Raises:
        ValueError: For other bits, and for other numbers of times than 1 to 100.

    Example:
        >>> config = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=8))
    """

    loftq_bits: int = 4
    loftq_iter: Steps = 1

    def __post_init__(self) -> None:
        check_options(self)
        if self.loftq_bits not in (4, 8):
            raise ValueError(f"loftq_bits must be 4 or 8, as in PEFT, not {self.loftq_bits!r}")


@dataclass(frozen=True)
class Loftq:
    """The principal singular vectors of what rounding leaves out."""

    replaces_weight = True
    takes_product = False
    b_is_trained = True
    is_measured = False

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank beyond the weight's."""
        return refused_rank(shape, rank)

    def first(self, given: Beginning) -> First:
        """Returns A, B, each with the roots of the singular values, and the rounded weight."""
        options: LoftQConfig = given.config.loftq_config
        rounded = _rounded_to_4_bits if options.loftq_bits == 4 else _rounded_to_8_bits
        A, B = given.weight.new_zeros(given.rank, 1), given.weight.new_zeros(1, given.rank)
        left = given.weight
        for _ in range(options.loftq_iter):
            left = rounded(given.weight - B @ A)
            U, S, Vt = torch.linalg.svd(given.weight - left, full_matrices=False)
            root = torch.diag(S[: given.rank].sqrt())
            A, B = root @ Vt[: given.rank], U[:, : given.rank] @ root
        return First(A, B, left)


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
