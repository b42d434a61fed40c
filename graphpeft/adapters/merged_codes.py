"""Merges adapters into quantised weights: codes become numbers, changes are added, and the sum is quantised as before.

    codes' = Q(Q⁻¹(codes) + ΔW₁ + ΔW₂ + …)

A layer gets another weight, and its own one is kept as it is, so that it comes back bit for bit. However often merging
is done in turn, the sum is made of the original numbers and rounded once. Numbers for one adapter are those of PEFT's
``tuners/lora/bnb.py`` and ``torchao.py``, which round once for each adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from graphpeft.adapters.changes import delta
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapters, Modules
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.sites import quantisers
from graphpeft.sites.quantisers import Codes, QuantisingError
from graphpeft.transaction import set_attribute, set_item
from graphpeft.wording import joined


def merge(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Gives layers the codes with the changes of adapters, which follow the order of the names."""
    sites = _by_owner(adapters, names)
    for path, numbers in _sums(modules, adapters, names):
        put(modules, {path: _quantised(modules, path, numbers)})
    if sites:
        warnings.warn(
            f"adapters are merged into the quantised weights of {joined(list(sites))}, which rounds the sums anew, so "
            "that outputs differ; merge_and_unload(dequantize=True) rounds nothing",
            PeftWarning,
            stacklevel=5,
        )


def merged(modules: Modules, adapters: Adapters, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns the sums as numbers, by the paths of the layers, which stay unchanged; rounded, if they act so."""
    rounded = {path for path, sites in _by_owner(adapters, names).items() if any(a.rule.rounds_sum for a in sites)}
    return {
        path: _quantised(modules, path, numbers).numbers() if path in rounded else numbers
        for path, numbers in _sums(modules, adapters, names)
    }


@torch.no_grad()
def _sums(modules: Modules, adapters: Adapters, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields the paths of layers, and the numbers of their weights with all changes, one after the other."""
    for path, sites in _by_owner(adapters, names).items():
        now = quantisers.codes_of(modules[path])
        numbers = base = adapters.codes.get(path, now).to(now.weight.device).numbers()
        for adapted in sites:
            numbers = numbers + delta(adapted, modules, numbers, base)
        yield path, numbers


def _quantised(modules: Modules, path: str, numbers: Tensor) -> Codes:
    try:
        return quantisers.quantised(modules[path], numbers)
    except QuantisingError as error:
        raise AdaptError(
            f"nothing can be merged into the weight of {path}: {error}; call merge_and_unload(dequantize=True)"
        ) from error


def keep(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Keeps the codes of all layers into which adapters are going to be merged."""
    for path in _by_owner(adapters, names):
        if path not in adapters.codes:
            set_item(adapters.codes, path, quantisers.codes_of(modules[path]))


def merged_now(modules: Modules, adapters: Adapters) -> dict[str, Codes]:
    """Returns the codes that layers have now, by the paths of those into which adapters are merged."""
    return {path: quantisers.codes_of(modules[path]) for path in adapters.codes if path in modules}


def put(modules: Modules, codes: Mapping[str, Codes]) -> None:
    """Gives layers other codes, on the devices on which theirs are now."""
    for path, others in codes.items():
        if path in modules:
            own = modules[path]._parameters["weight"]
            there = others if own is None else others.to(own.device)
            set_item(modules[path]._parameters, "weight", there.weight)
            for name, value in there.beside.items():
                set_attribute(modules[path], name, value)


def _by_owner(adapters: Adapters, names: Iterable[str]) -> dict[str, list[AdaptedSite]]:
    found: dict[str, list[AdaptedSite]] = {}
    for name in names:
        for adapted in adapters.by_name[name].coded_sites:
            found.setdefault(adapted.site.owner, []).append(adapted)
    return found
