"""Runs a region on a mixed batch by the graph of one adapter after the other, each on its own rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from graphpeft._torch import pytree
from graphpeft.adapters.graphs import with_adapter
from graphpeft.adapters.present_rows import ROWS, present
from graphpeft.adapters.rows import RowAdapters, Runner
from graphpeft.adapters.state import Adapters
from graphpeft.graph import overrides
from graphpeft.graph.call_inputs import given_to_rows
from graphpeft.graph.recomputing import taken_along
from graphpeft.graph.template import Template
from graphpeft.wording import number_of


def in_turn(
    plain: Template,
    module: nn.Module,
    region: str,
    adapters: Adapters,
    others: Mapping[int, str],
    has_tensors: bool,
) -> Runner:
    """Returns a function that runs the graph of each adapter on its own rows."""

    def forward_with(name: str) -> Callable[..., Any]:
        content = adapters.by_name.get(name)
        sites = [adapted for adapted in content.sites if adapted.site.region == region] if content is not None else []
        if content is None or not sites:
            return plain.forward_for(others)
        slot = next(slot for slot in itertools.count() if slot not in plain.slots)
        template = with_adapter(plain, module, slot, content.config.method, region, sites)
        return template.forward_for({**others, slot: name})

    forward_with = functools.cache(forward_with)

    @functools.cache
    def reading_of(name: str) -> Callable[[nn.Module], dict[str, torch.Tensor]]:
        content = adapters.by_name.get(name)
        return content.reading(region, name) if content is not None else lambda _: {}

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        dims = _row_dims(module, len(tensors))
        if not tensors or _is_unclear(tensors, dims):
            raise ValueError(
                f"{region or 'the model'} is given tensors of the shapes {[tuple(t.shape) for t in tensors]}, of which "
                "it isn't known which are rows of the batch; call it for one adapter at a time"
            )
        batch = present()
        of_rows = batch.of(tensors[0], module)
        groups = of_rows.groups()
        results = []
        for name, rows in groups.items():
            index = torch.tensor(rows, device=tensors[0].device)
            # what is one tensor stays one: an attention asks whether its key is its query
            taken = {id(tensor): tensor.index_select(dim, index) for tensor, dim in zip(tensors, dims, strict=True)}
            given = [taken[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            own_args, own_kwargs = pytree.tree_unflatten(given, structure)
            # regions inside have the same adapter for all of these rows
            of_one = {len(rows): RowAdapters((name,) * len(rows), of_rows.batch, adapters)}
            with taken_along(functools.partial(ROWS.during, batch.of_some(of_one))), given_to_rows(rows):
                owner = overrides.with_tensors(module, reading_of(name)(module)) if has_tensors else module
                results.append(forward_with(name)(owner, *own_args, **own_kwargs))
        return _together(results, list(groups.values()), module, region)

    return run


def _row_dims(module: nn.Module, count: int) -> list[int]:
    """Returns the dimension of rows of each tensor that a module is given, or returns.

    A recurrent layer's states, which come after its input, have layers first.
    """
    return [0, *[int(isinstance(module, nn.RNNBase))] * (count - 1)]


def _is_unclear(tensors: list[torch.Tensor], dims: list[int]) -> bool:
    """Returns whether a tensor has another number of rows than the first, or may have it by chance.

    A table of positions has as many rows as there are tokens, which may be as many as the batch has rows.
    """
    first = tensors[0]
    rows = first.shape[:1]
    for tensor, dim in zip(tensors, dims, strict=True):
        if tensor.shape[dim : dim + 1] != rows or (tensor.ndim < first.ndim and rows[0] in first.shape[1:]):
            return True
    return False


def _together(results: list[Any], groups: list[list[int]], module: nn.Module, region: str) -> Any:
    """Puts the rows of several results into one, in their order in the batch."""
    order = torch.tensor([row for rows in groups for row in rows]).argsort()
    leaves, structures = zip(*map(pytree.tree_flatten, results), strict=True)
    dims = iter(_row_dims(module, sum(isinstance(leaf, torch.Tensor) for leaf in leaves[0])))

    def gather(parts: tuple[Any, ...]) -> Any:
        if not isinstance(parts[0], torch.Tensor):
            return parts[0]
        dim = next(dims)
        for part, rows in zip(parts, groups, strict=True):
            if part.shape[dim : dim + 1] != (len(rows),):
                raise ValueError(
                    f"{region or 'the model'} returns a tensor of the shape {tuple(part.shape)} for "
                    f"{number_of(len(rows), 'row')}, which can't be put together; call it for one adapter at a time"
                )
        return torch.cat(parts, dim).index_select(dim, order.to(parts[0].device))

    return pytree.tree_unflatten([gather(parts) for parts in zip(*leaves, strict=True)], structures[0])
