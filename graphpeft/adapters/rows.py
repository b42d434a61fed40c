"""The adapters of the rows of a batch: their parameters and numbers, stacked row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphpeft._torch import without_compiler
from graphpeft.adapters.adapter_names import BASE
from graphpeft.adapters.formulas import Formula
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.reads import in_mixture
from graphpeft.adapters.state import Adapters, Modules
from graphpeft.graph.holders import as_number
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.wording import joined, number_of

Runner = Callable[..., Any]
"""Runs a region on a mixed batch; its first argument is the module."""


Where = tuple[str, str, str]
"""The region of a site, its weight's module, and the weight's name there."""


class RowAdapters:
    """Which adapter each row of a tensor has."""

    def __init__(self, names: tuple[str, ...], batch: Sequence[str], adapters: Adapters) -> None:
        self.names = names
        self.batch, self._adapters = batch, adapters
        self._there: dict[Any, list[str]] = {}
        self._numbers: dict[Any, torch.Tensor] = {}

    def stacked(self, owner: nn.Module, stem: str, where: Where | None) -> torch.Tensor:
        """Returns the adapters' parameters `stem` of `owner`, one for each row.

        Smaller ones are filled up with zeros, and rows whose adapter has none there get zeros alone.
        """
        holders = self._holders(owner, where)
        # each call of each layer goes through all rows here, so no function is called for one
        parameters = [None if holder is None else holder._parameters.get(stem) for holder in holders]
        first = parameters[0]
        if first is not None:
            shape = first.shape  # making it takes most of the time
            there: list[torch.Tensor] = [each for each in parameters if each is not None and each.shape == shape]
            if len(there) == len(parameters):
                return torch.stack(there)
        tensors = [None if holder is None else _tensor(holder, stem) for holder in holders]
        there = [tensor for tensor in tensors if tensor is not None]
        if not there:
            # an adapter of another batch may have another rank
            known = [owner._modules.get(name) for name in self.batch]
            like = next(t for holder in known if holder is not None and (t := _tensor(holder, stem)) is not None)
            return like.new_zeros(len(tensors), *like.shape)
        shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in there), strict=True)]
        nothing = there[0].new_zeros(shape)
        return torch.stack([nothing if tensor is None else _filled_up(tensor, shape) for tensor in tensors])

    def number(self, owner: nn.Module, stem: str, missing: float | None) -> Any:
        """Returns the adapters' number `stem` of `owner`: one for all rows, or a tensor with one for each."""
        holders = self._holders(owner, None)
        found = [missing if holder is None else holder.__dict__.get(stem, missing) for holder in holders]
        if not {*map(type, found)} <= _NUMBERS:
            found = list(map(as_number, found))
        elif found[0] is not None and found.count(found[0]) == len(found):
            return found[0]
        values = tuple(found)
        there = {*values}
        there.discard(None)
        if len(there) == 1:
            return next(iter(there))
        if values not in self._numbers:
            numbers = [0.0 if value is None else value for value in values]
            self._numbers[values] = torch.tensor(numbers, dtype=torch.float64)
        return self._numbers[values]

    def dropout(self, owner: nn.Module, stem: str) -> Any:
        """Returns the probability with which each row's adapter drops now, as `number` does; 0 for those that don't."""
        drops: Any = [None if holder is None else holder._modules.get(stem) for holder in self._holders(owner, None)]
        found = tuple(drop.p if drop is not None and drop.training else 0.0 for drop in drops)
        if found.count(found[0]) == len(found):
            return found[0]
        if found not in self._numbers:
            self._numbers[found] = torch.tensor(found, dtype=torch.float64)
        return self._numbers[found]

    def _holders(self, owner: nn.Module, where: Where | None) -> list[nn.Module | None]:
        """Returns the holder of each row's adapter in `owner`, or None for rows whose adapter isn't meant."""
        if where not in self._there:
            are_there = {name: name != BASE and self._is_at(name, where) for name in set(self.names)}
            self._there[where] = [name if are_there[name] else "" for name in self.names]
        return list(map(owner._modules.get, self._there[where]))  # no module has an empty name

    def _is_at(self, name: str, where: Where | None) -> bool:
        return where is None or any(place_of(site)[:3] == where for site in self._adapters.by_name[name].sites)

    def groups(self) -> dict[str, list[int]]:
        """Returns the rows of each adapter."""
        found: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            found.setdefault(name, []).append(row)
        return found


_NUMBERS = {int, float, type(None)}


def _tensor(holder: nn.Module, stem: str) -> torch.Tensor | None:
    return holder._parameters.get(stem, holder._buffers.get(stem))


def _filled_up(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    missing = [amount for size, have in zip(shape, tensor.shape, strict=True) for amount in (size - have, 0)]
    return torch.nn.functional.pad(tensor, missing[::-1])


class Rows:
    """The rows of the present call.

    Attributes:
        by_count: The adapters of rows, by the number of rows that a tensor may have.
        modules: Returns the model's modules by path.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        runners: Mapping[int, Runner],
        by_count: dict[int, RowAdapters],
        adapters: Adapters,
        modules: Callable[[], Modules],
    ) -> None:
        self._names, self._runners, self.by_count, self._adapters = names, runners, by_count, adapters
        self._wanted = frozenset(names)
        self.modules = modules

    def runner_of(self, module: nn.Module) -> Runner | None:
        """Returns how a region runs, or None for other modules, and where the model's adapters were disabled since."""
        if self._adapters.merged:
            self._refuse(self._adapters.merged, "merged into the weights, which all rows share")
        if not self._wanted <= self._adapters.by_name.keys():
            self._refuse([name for name in self._names if name not in self._adapters.by_name], "deleted")
        return None if self._adapters.are_off else self._runners.get(id(module))

    def of_some(self, by_count: dict[int, RowAdapters]) -> Rows:
        """Returns the rows of a call with some rows of the batch."""
        return Rows((), self._runners, by_count, self._adapters, self.modules)

    def _refuse(self, names: Sequence[str], how: str) -> None:
        raise AdaptError(
            f"since this batch was given adapters by row, {joined(list(names))} were {how}; leave mixed_batch, and "
            "enter it anew"
        )

    @without_compiler("which rows have an adapter that changes a tensor is looked up")
    def read(self, module: nn.Module, acting: Formula) -> torch.Tensor | None:
        """Returns a tensor of a module for code that reads it outside of the graphs that run by row.

        Its numbers raise AdaptError where they differ from row to row.
        """
        names = {name for rows in self.by_count.values() for name in rows.names}
        return in_mixture(self.modules(), self._adapters, names, module, acting)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters that some row has."""
        return self._names

    def of(self, tensor: torch.Tensor, module: nn.Module) -> RowAdapters:
        """Returns the adapters of the rows of `tensor`."""
        count = tensor.shape[0] if tensor.ndim else 0
        if count not in self.by_count:
            *fewer, most = self.by_count
            wanted = " or ".join([*map(str, fewer), number_of(most, "row")])
            path = next((path for path, known in self.modules().items() if known is module), "")
            raise ValueError(
                f"adapter_names names {wanted}, and {path or 'the model'} is given a tensor of the shape "
                f"{tuple(tensor.shape)}; name one adapter for each row of the batch, which must be the first dimension "
                "there"
            )
        return self.by_count[count]


def place_of(adapted: AdaptedSite) -> tuple[Any, ...]:
    """Returns what two adapters' sites have in common that are the same one: region, weight, operations."""
    site: Any = adapted.site
    return site.region, site.owner, site.attribute, site.op, site.nodes
