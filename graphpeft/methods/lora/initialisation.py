"""First values of A and B that come from the weight W, (out, in), instead of chance.

    pissa       W = U S Vᵀ:   B = U_r √(S_r/s),  A = √(S_r/s) V_rᵀ,        W becomes W − s B A
    olora       W = Q R:      B = Q_r,           A = R_r,                  W becomes W − s B A
    mica        W = U S Vᵀ:   B = the last r columns of U, never trained,  A = 0
    orthogonal  A and B random, with B A = 0

s is the scale of the branch and r its rank. Where a part of the weight is taken, the module reads a frozen stand-in
without it while the adapter acts; its own weight stays as it is. The stand-in isn't saved: it follows from the weight
again where a file is loaded, as in PEFT, which changes the weight itself. Sources: Meng et al., "PiSSA", arXiv
2404.02948; Büyükakyüz, "OLoRA", arXiv 2406.01775; "MiCA", arXiv 2604.01694;
https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation. The numbers are those of PEFT's
``tuners/lora/layer.py``, but for OLoRA of a weight that is stored as (in, out): PEFT decomposes it as it is stored,
which fits no A and B of its own; here it is W that is decomposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from graphpeft.methods.lora.factors import draw, draw_as_layers, rank_of, scaling_of
from graphpeft.sites import Site

RANDOM = (True, False, "gaussian")
"""Values of `init_lora_weights` that look at no weight."""


class Beginning(NamedTuple):
    """What first values are made from.

    Attributes:
        weight: W, in single precision at least.
        rank: The rank.
        scaling: The scale of the branch.
        module: The module that has the weight.
        config: The config.
    """

    weight: Tensor
    rank: int
    scaling: float
    module: nn.Module
    config: Any


class Initialisation(Protocol):
    """How A and B get their first values, where these aren't random alone."""

    @property
    def takes_from_weight(self) -> bool:
        """Whether B A is taken from the weight."""
        ...

    @property
    def b_is_trained(self) -> bool:
        """Whether B is trained."""
        ...

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Returns the reason why a weight of this shape can't be the beginning, or None."""
        ...

    def factors(self, given: Beginning) -> tuple[Tensor, Tensor]:
        """Returns A and B."""
        ...


@dataclass(frozen=True)
class Pissa:
    """The principal singular vectors.

    Attributes:
        iterations: How many steps approximate them; None for all singular values, exactly.
    """

    iterations: int | None = None
    takes_from_weight = True
    b_is_trained = True

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank beyond the weight's, and a scale without a root."""
        if scaling <= 0:
            return "pissa divides by the scale; make lora_alpha positive"
        return _refused_rank(shape, rank)

    def factors(self, given: Beginning) -> tuple[Tensor, Tensor]:
        """Returns the r first singular vectors, each with a half of its singular value."""
        if self.iterations is None:
            U, S, Vt = torch.linalg.svd(given.weight, full_matrices=False)
            U, S, Vt = U[:, : given.rank], S[: given.rank], Vt[: given.rank]
        else:
            U, S, V = torch.svd_lowrank(given.weight, given.rank, niter=self.iterations)
            Vt = V.t()
        root = torch.diag(torch.sqrt(S / given.scaling))
        return root @ Vt, U @ root


@dataclass(frozen=True)
class Olora:
    """An orthonormal basis of the weight's first columns."""

    takes_from_weight = True
    b_is_trained = True

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank beyond the weight's."""
        return _refused_rank(shape, rank)

    def factors(self, given: Beginning) -> tuple[Tensor, Tensor]:
        """Returns the first rows and columns of a QR decomposition."""
        Q, R = torch.linalg.qr(given.weight)
        return R[: given.rank], Q[:, : given.rank]


@dataclass(frozen=True)
class Mica:
    """The minor singular vectors, of which A alone learns a use."""

    takes_from_weight = False
    b_is_trained = False

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank beyond the weight's."""
        return _refused_rank(shape, rank)

    def factors(self, given: Beginning) -> tuple[Tensor, Tensor]:
        """Returns zero, and the last singular vectors."""
        return given.weight.new_zeros(given.rank, given.weight.shape[1]), minor_directions(given.weight, given.rank)


@dataclass(frozen=True)
class Orthogonal:
    """Random factors whose product is zero, though neither is."""

    takes_from_weight = False
    b_is_trained = True

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank that can't be halved."""
        return f"orthogonal halves the rank, and {rank} is odd; choose an even r" if rank % 2 else None

    def factors(self, given: Beginning) -> tuple[Tensor, Tensor]:
        """Draws both in the span of two halves of one orthonormal basis."""
        rows, columns = given.weight.shape
        Q, _ = torch.linalg.qr(torch.randn(given.rank, given.rank))
        A = (torch.randn(columns, given.rank // 2) @ Q[0::2]).T / 10.0
        B = (torch.randn(given.rank // 2, rows).T @ Q[1::2]) / 10.0
        return A, B


_BY_NAME: dict[str, Initialisation] = {
    "pissa": Pissa(),
    "olora": Olora(),
    "mica": Mica(),
    "orthogonal": Orthogonal(),
}
_WITH_STEPS = re.compile(r"pissa_niter_(\d+)")


def initialisation_of(kind: bool | str) -> Initialisation | None:
    """Returns what the config's `init_lora_weights` means, or None for random values.

    Raises:
        ValueError: If it means nothing.
    """
    if kind in RANDOM:
        return None
    steps = _WITH_STEPS.fullmatch(str(kind))
    found = Pissa(int(steps[1])) if steps else _BY_NAME.get(str(kind))
    if found is None:
        known = ", ".join(map(repr, (*RANDOM, *_BY_NAME, "pissa_niter_<steps>")))
        raise ValueError(f"init_lora_weights={kind!r} is not supported; choose one of {known}")
    return found


def takes_from_weight(config: Any) -> bool:
    """Tells whether the first B A is taken from the weight."""
    found = initialisation_of(config.init_lora_weights)
    return found is not None and found.takes_from_weight


def b_is_trained(config: Any) -> bool:
    """Tells whether B is trained."""
    found = initialisation_of(config.init_lora_weights)
    return found is None or found.b_is_trained


def refused(site: Site, config: Any, flipped: bool) -> str | None:
    """Returns the reason why the config's initialisation can't be done at a matrix, or None."""
    found = initialisation_of(config.init_lora_weights)
    if found is None:
        return None
    if not site.dtype.is_floating_point:
        return f"init_lora_weights={config.init_lora_weights!r} looks at its values, which are {site.dtype}"
    rows, columns = reversed(site.shape) if flipped else site.shape
    return found.refused((rows, columns), rank_of(site, config), scaling_of(site, config))


def refused_of_embedding(site: Site, config: Any) -> str | None:
    """Returns the reason why the config's initialisation can't be done at an embedding, or None."""
    if config.init_lora_weights == "mica":
        return refused(site, config, flipped=True)
    return refused_unless_random(config, "an embedding")


def refused_unless_random(config: Any, what: str) -> str | None:
    """Returns the reason why the config's initialisation can't be done where there is no matrix, or None."""
    if config.init_lora_weights in RANDOM:
        return None
    return f"init_lora_weights={config.init_lora_weights!r} is for linear weights, and it is {what}"


def initialise(
    parameters: Mapping[str, Tensor], site: Site, config: Any, module: nn.Module, flipped: bool
) -> Mapping[str, Tensor] | None:
    """Gives A and B of a matrix their first values, as PEFT does, so that equal seeds give equal values.

    Args:
        parameters: `lora_A`, `lora_B`, and `lora_bias` if there is one; filled in place.
        site: Their site.
        config: The config.
        module: The module that has the weight.
        flipped: Whether A and B are those of the weight's transpose.

    Returns:
        The weight without B A, by its name, if that is taken from it.
    """
    found, rank = initialisation_of(config.init_lora_weights), rank_of(site, config)
    if found is None:
        draw(parameters, config.init_lora_weights, rank)
        return None
    draw_as_layers(parameters)
    weight, scaling = weight_of(site, module), scaling_of(site, config)
    weight = weight.T if flipped else weight
    A, B = found.factors(Beginning(weight, rank, scaling, module, config))
    parameters["lora_A"].copy_(A)
    parameters["lora_B"].copy_(B)
    if not found.takes_from_weight:
        return None
    left = weight - scaling * B @ A
    return {site.attribute: (left.T if flipped else left).contiguous()}


def weight_of(site: Site, module: nn.Module) -> Tensor:
    """Returns the values of a weight, in single precision at least."""
    weight = module._parameters[site.attribute]
    assert weight is not None
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def minor_directions(weight: Tensor, rank: int) -> Tensor:
    """Returns the left singular vectors of the smallest singular values, as columns."""
    U, _, _ = torch.linalg.svd(weight, full_matrices=False)
    return U[:, -rank:]


def _refused_rank(shape: tuple[int, int], rank: int) -> str | None:
    if rank <= min(shape):
        return None
    return f"its rank is {min(shape)} at most, and r is {rank}; choose a smaller one"
