"""Optimisation passes on adapted graphs, which save time or memory without changing the results.

Each pass is a function on a graph. Passes recognise operations by their computation, and know no adapter method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from graphpeft.graph.template import Graphs, Template
from graphpeft.passes.flattened_rows import flattened_rows
from graphpeft.passes.grouped_products import grouped_products
from graphpeft.passes.inplace_addmm import inplace_addmm
from graphpeft.passes.outcome import Outcome, Pass
from graphpeft.passes.recomputed_casts import recomputed_casts
from graphpeft.passes.recomputed_inputs import recomputed_inputs
from graphpeft.passes.regenerated_dropout import regenerated_dropout
from graphpeft.passes.shared_casts import shared_casts

__all__ = ["PASSES", "Optimized", "Outcome", "Pass", "Passes", "in_order", "optimized"]

PASSES: tuple[Pass, ...] = (
    # first, since all other passes keep shapes
    Pass("flattened_rows", flattened_rows, looks_for="linear operations with branches"),
    # before other passes make casts a part of products
    Pass("shared_casts", shared_casts, looks_for="casts of an input that several branches in one graph share"),
    # before casts become a part of products, since dropout is between cast and product
    Pass("regenerated_dropout", regenerated_dropout, looks_for="products of the output of dropout"),
    # before the grouping, which takes the saved tensors over
    Pass("recomputed_casts", recomputed_casts, looks_for="products of casts"),
    Pass("grouped_products", grouped_products, looks_for="products of a branch's input"),
    # after the grouping, since it also changes grouped products
    Pass("recomputed_inputs", recomputed_inputs, looks_for="products of a branch's input"),
    # last, since it removes the products that other passes look for
    Pass(
        "inplace_addmm",
        inplace_addmm,
        looks_for="sums of a linear operation's value and a branch's product",
    ),
)
"""All passes, in the order of their application."""

_OUTCOMES = "graphpeft.passes"
"""The key in a template's ``meta`` for the outcomes of passes."""


class Optimized(NamedTuple):
    """A template after passes.

    Attributes:
        template: The optimised template, or the template without passes if no pass has changed it.
        outcomes: The outcomes of each pass at its sites, by the pass's name.
    """

    template: Template
    outcomes: Mapping[str, tuple[Outcome, ...]]


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of passes in the order of their application.

    Raises:
        TypeError: If `names` is a string.
        ValueError: If a name isn't the name of a pass.
    """
    if isinstance(names, str):
        raise TypeError(f"passes is the text {names!r}; pass a list of names, [{names!r}]")
    wanted = list(names)
    known = [each.name for each in PASSES]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"there is no pass {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(name for name in known if name in wanted)


def optimized(plain: Template, module: nn.Module, names: tuple[str, ...]) -> Optimized:
    """Applies the passes `names` to a copy of the template `plain`.

    Args:
        plain: A template without passes.
        module: A module with this template.
        names: The names of passes, in the order of their application.
    """
    if not names:
        return Optimized(plain, {})
    outcomes: dict[str, tuple[Outcome, ...]] = {}

    def edit(graphs: Graphs) -> None:
        for each in PASSES:
            if each.name in names:
                found = [outcome for graph in graphs for outcome in each.apply(graph, module)]
                outcomes[each.name] = tuple(dict.fromkeys(found))

    template = plain.optimized(("passes", names), edit, {_OUTCOMES: outcomes})
    said = template.meta[_OUTCOMES]
    is_changed = any(outcome.reason is None for found in said.values() for outcome in found)
    return Optimized(template if is_changed else plain, said)


@dataclass(frozen=True)
class Passes:
    """The passes of an adapted model, applied whenever its adapters change.

    Attributes:
        names: The names of the passes, in the order of their application.
    """

    names: tuple[str, ...]

    def __call__(self, plain: Template, module: nn.Module) -> Template:
        """Returns the optimised template that `module` gets in place of `plain`."""
        return optimized(plain, module, self.names).template
