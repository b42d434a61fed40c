"""The rows of a weight in groups of similar left singular vectors, by k-means.

The same numbers as PEFT's ``tuners/adamss/utils.py``, whose k-means is scikit-learn's.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphpeft.graph.computed_weights import read_weight
from graphpeft.methods.matrices import as_matrices, matrices_of, svd_by_seed
from graphpeft.sites.site import Site


class Group(NamedTuple):
    """Some rows of a weight, whose change is a product of low rank.

    Attributes:
        rows: Their indices.
        rank: The rank.
    """

    rows: Tensor
    rank: int


def own_bias(site: Any) -> str | None:
    """Returns the name of the bias that belongs to the module with a site's weight and is added there, or None."""
    bias = getattr(site, "bias", None)
    path, _, name = bias.rpartition(".") if bias is not None else (None, "", None)
    return name if path == site.owner else None


def decomposed(site: Site, config: Any, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns the left singular vectors of a weight, and the right ones, of which those of the bias are a part.

    Returns:
        Tensors (out, r) and (r, in), or (r, in + 1) with a bias.
    """
    weight = read_weight(module, site.attribute)
    assert weight is not None
    matrix, name = as_matrices(site.weight_layout.turned(weight.detach()), site), own_bias(site)
    if name is not None:
        matrix = torch.cat([matrix, module._parameters[name].detach()[:, None]], 1)  # type: ignore[union-attr]
    left, _, right = svd_by_seed(matrix.float(), min(config.r, *matrix.shape), 2, config.random_seed)
    return left, right.mT


def rank_of(site: Any, config: Any) -> int:
    """Returns the number of singular vectors of a site's weight that are taken."""
    _, rows, columns = matrices_of(site)
    return min(config.r, rows, columns + (own_bias(site) is not None))


def groups_of(
    site: Site, config: Any, module: nn.Module
) -> tuple[tuple[Group, ...] | str, tuple[Tensor, Tensor] | None]:
    """Returns the groups of a weight's rows, or why there are none; with groups, also the result of `decomposed`."""
    weight = read_weight(module, site.attribute)
    if weight is None or weight.is_meta:
        return "its rows are grouped by its numbers, and it has none yet; load the model first", None
    name = site.attribute.replace("weight", "bias")
    if name != site.attribute and module._parameters.get(name) is not None and own_bias(site) is None:
        return f"its {name} would change as well, and no graph shows where that is added; pass example_inputs", None
    left, right = decomposed(site, config, module)
    labels = _labels(left, min(config.num_subspaces, len(left)))
    sizes = torch.bincount(labels, minlength=min(config.num_subspaces, len(left)))
    if not bool(sizes.all()):
        return f"its rows are of {int((sizes > 0).sum())} kinds, and not of num_subspaces={config.num_subspaces}", None
    parts = [torch.where(labels == group)[0] for group in range(len(sizes))]
    return tuple(Group(rows, _rank(left[rows.to(left.device)], config)) for rows in parts), (left, right)


def _labels(left: Tensor, number: int) -> Tensor:
    clusters: Any = importlib.import_module("sklearn.cluster")
    kmeans = clusters.KMeans(n_clusters=number, init="random", n_init=1, max_iter=10, random_state=123456789)
    with warnings.catch_warnings():
        # equal rows, which the caller sees
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        return torch.from_numpy(kmeans.fit_predict(left.cpu().numpy())).long()


def _rank(vectors: Tensor, config: Any) -> int:
    """Returns the rank of a group's change, for the left singular vectors of its rows."""
    most = min(*vectors.shape, config.subspace_rank)
    if not config.use_dynamic_rank:
        return most
    values = torch.linalg.svdvals(vectors @ vectors.mT)
    return max(1, min(most, int((values > config.svd_threshold * values[0]).sum())))


def is_installed() -> bool:
    """Returns whether scikit-learn is there."""
    return importlib.util.find_spec("sklearn") is not None


def fresh_factor(vectors: Tensor, group: Group, config: Any) -> Tensor:
    """Returns A of a group at first, (rank, r), by as many random numbers as PEFT draws for it.

    Args:
        vectors: The left singular vectors of its rows, (rows, r).
        group: The group.
        config: The config.
    """
    products = vectors @ vectors.mT
    if config.use_dynamic_rank:
        torch.svd_lowrank(products, q=len(products), niter=2)
    left, _, _ = torch.svd_lowrank(products, q=group.rank, niter=2)
    return torch.linalg.qr(vectors.mT @ left).Q.mT


def same_directions(one: Tensor, other: Tensor) -> bool:
    """Returns whether rows of unit length are the same, but for rounding and their signs.

    Args:
        one: The rows.
        other: Others, in the same shape.
    """
    products = (one.float() * other.float().to(one.device)).sum(-1).abs()
    return bool((products > 0.99).all())
