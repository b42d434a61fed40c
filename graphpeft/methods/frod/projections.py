"""The tensors that the layers of a category share in FRoD: a basis of their inputs, and places in a matrix.

    [W₁; …; Wₙ] = [Q₁; …; Qₙ] R        V = Rᵀ E, E the eigenvectors of the mean of (QₖᵀQₖ + α)⁻¹

With fewer rows than inputs, V has the right singular vectors of all weights. The same numbers as PEFT's
``tuners/frod/model.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.graph.computed_weights import read_weight
from graphpeft.methods.matrices import as_matrices, matrices_of
from graphpeft.rules.weight_reader import WeightReader


def category_of(name: str) -> str:
    """Returns the category of a layer, which layers of the same role in other blocks have, too."""
    *before, last = name.split(".")
    if not before or before[-1].isdigit():
        return last
    if (*before[-2:], last) == ("attention", "output", "dense"):
        return "attention_output"
    return f"{before[-1]}_{last}"


def _block_of(name: str, number: int) -> int:
    """Returns the number of the block in which a layer is, or the layer's own number."""
    parts = name.split(".")
    behind = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    for part in (*behind, *parts):
        if part.isdigit():
            return int(part)
    return number


def count_of(size: int, rate: float) -> int:
    """Returns the number of places that are trained beside the diagonal."""
    most = size * size - size
    return min(max(int(size * size * rate), 1 if rate else 0), most)


def numbers_of(site: Any, module: nn.Module) -> Tensor:
    """Returns a weight as matrices, (*stack, out, in), on the CPU."""
    weight = read_weight(module, site.attribute)
    assert weight is not None
    return as_matrices(site.weight_layout.turned(weight.detach()), site).cpu()


class Projections:
    """The bases and the places of all categories, each of which is made when it is asked for."""

    def __init__(self, config: Any, sites: Sequence[Any], weights: WeightReader) -> None:
        self._config, self._weights = config, weights
        blocks: dict[int, dict[str, Any]] = {}
        for number, site in enumerate(sites):
            # as in PEFT, where the last one of a block and a category stands for the others there
            blocks.setdefault(_block_of(site.name, number), {})[category_of(site.name)] = site
        categories = sorted({category for block in blocks.values() for category in block})
        self._sites = {
            category: [block[category] for _, block in sorted(blocks.items()) if category in block]
            for category in categories
        }
        self._bases: dict[str, Tensor] = {}

    def basis(self, category: str) -> Tensor:
        """Returns V, (in, in)."""
        if category not in self._bases:
            read = [self._weights.read(site, functools.partial(_rows_of, site)) for site in self._sites[category]]
            self._bases[category] = basis_of(read, self._config.regularization_alpha)
        return self._bases[category]

    @functools.cached_property
    def places(self) -> Mapping[str, Tensor]:
        """The rows and the columns of the places of each category, (2, number)."""
        generator, found = torch.Generator().manual_seed(self._config.projection_prng_key), {}
        for category, sites in self._sites.items():
            size = matrices_of(sites[0]).columns
            count = count_of(size, self._config.sparse_rate)
            drawn = torch.randperm(size * size - size, generator=generator)[:count] if count else torch.zeros(0).long()
            rows, columns = drawn // max(1, size - 1), drawn % max(1, size - 1)
            found[category] = torch.stack([rows, columns + (columns >= rows)])
        return found


def _rows_of(site: Any, module: nn.Module) -> Tensor:
    # a copy, since the weight may be gone later
    return numbers_of(site, module).flatten(0, -2).to(torch.float32, copy=True)


def basis_of(matrices: Sequence[Tensor], alpha: float) -> Tensor:
    """Returns V for the weights of a category.

    Args:
        matrices: The weights, (out, in) each.
        alpha: α.
    """
    stacked = torch.cat([*matrices])
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True)[2].T
    q, r = torch.linalg.qr(stacked)
    unit = torch.eye(r.shape[1], dtype=r.dtype)
    inverses = [torch.linalg.inv(part.T @ part + alpha * unit) for part in q.split([len(m) for m in matrices])]
    total = torch.zeros_like(unit)
    for inverse in inverses:
        total += inverse
    return r.T @ torch.linalg.eigh(total / len(inverses)).eigenvectors


def coordinates(basis: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns U with columns of length 1, and λ, so that W = U diag(λ) Vᵀ.

    Args:
        basis: V, (in, in).
        weight: W, (*stack, out, in).

    Returns:
        Tensors (*stack, out, in) and (*stack, in), in single precision.
    """
    v, w = basis.double(), weight.double()
    try:
        made = torch.linalg.solve(v, w.mT).mT
    except RuntimeError:
        made = w @ torch.linalg.pinv(v, rtol=1e-6).T
    lengths = torch.linalg.vector_norm(made, dim=-2)
    is_there = lengths > 1e-12
    unit = torch.where(is_there[..., None, :], made / torch.where(is_there, lengths, 1)[..., None, :], 0)
    return unit.float(), lengths.float()


def is_spanned(basis: Tensor, unit: Tensor, lengths: Tensor, weight: Tensor) -> bool:
    """Returns whether U diag(λ) Vᵀ is W, but for rounding, which in half precision may be anything."""
    if weight.dtype.itemsize < 4:
        return True
    difference = (unit * lengths[..., None, :]) @ basis.float().mT - weight.float()
    return bool(difference.norm() <= 3e-3 * weight.float().norm())
