"""Applies passes to an adapted model, and reports their outcomes.

A template that comes from passes knows its plain one. Adapters come and go, and rows are mixed, in the plain one alone;
passes are applied to the result. For a compiler, an exporter or a transform, passes compute the plain form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.adapters.exchanged import refuse_exchanged_classes
from graphpeft.adapters.graphs import by_region, worn_in
from graphpeft.adapters.state import Adapters, Modules
from graphpeft.graph.template import wear_template
from graphpeft.passes import PASSES, Optimized, Passes, in_order, optimized
from graphpeft.transaction import set_attribute, transaction
from graphpeft.wording import as_html, joined, text_table


@dataclass(frozen=True)
class PassReport:
    """The sites in a model's graphs that passes changed and left, by the names of the passes.

    Attributes:
        changed: The sites that each pass changed.
        left: The sites that each pass considered and left unchanged, with the reasons.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimize(model, ["inplace_addmm"]).changed
        {'inplace_addmm': ('0',)}
    """

    changed: Mapping[str, tuple[str, ...]]
    left: Mapping[str, Mapping[str, str]]

    def __str__(self) -> str:
        if not self.changed:
            return "no passes: the graphs compute as they were written"
        rows = [(name, str(len(self.changed[name])), str(len(self.left[name]))) for name in self.changed]
        lines = text_table(("pass", "changed", "left"), rows, ("changed", "left"))
        for name in self.changed:
            by_reason: dict[str, list[str]] = {}
            for site, reason in self.left[name].items():
                by_reason.setdefault(reason, []).append(site)
            lines += [f"{name} leaves {joined(sites)}: {reason}" for reason, sites in by_reason.items()]
            if not self.changed[name] and not by_reason:
                lines += [f"{name} finds nothing: there are no {_LOOKS_FOR[name]}"]
        return "\n".join(lines)

    __repr__ = __str__
    _repr_html_ = as_html


_LOOKS_FOR = {each.name: each.looks_for for each in PASSES}


def optimize(model: nn.Module, passes: Iterable[str] | None = None) -> PassReport:
    """Applies optimisation passes to an adapted model's graphs, for speed or for less memory in the backward.

    The passes apply to all adapters of the model, also to later ones, until the next call. ``optimize(model, [])``
    removes them and restores results bit for bit. The order of `passes` doesn't matter. Modules without an active
    adapter run their own code, as they do without passes.

    Args:
        model: An adapted model, or an adapted graph module.
        passes: The names of passes, see the documentation's page on passes; None means all passes.

    Returns:
        The sites of active adapters that each pass changed, and the sites that it left, with the reasons.

    Raises:
        AdaptError: If the model has no adapters, or other code has replaced the class of an adapted module; the model
            is unchanged.
        ValueError: If a name isn't the name of a pass; the model is unchanged.
        TypeError: If `passes` is a string; the model is unchanged.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimize(model, ["inplace_addmm"])
        pass           changed  left
        ─────────────  ───────  ────
        inplace_addmm        1     0
    """
    names = in_order([each.name for each in PASSES] if passes is None else passes)
    state = known_adapters(model)
    with transaction(model):
        return _report(state, names, _applied(modules_of(model), state, names))


def _applied(modules: Modules, state: Adapters, names: tuple[str, ...]) -> dict[str, Optimized]:
    """Applies passes to the graphs of the acting adapters; returns the results by the paths of their regions."""
    refuse_exchanged_classes(modules, state)
    sites = [adapted for name in state.acting for adapted in state.by_name[name].sites]
    done = {
        region: optimized(worn_in(state, region, modules), modules[region], names)
        for region in by_region(sites, modules)
    }
    for region, found in done.items():
        wear_template(modules[region], found.template)
    set_attribute(state, "passes", Passes(names) if names else None)
    return done


def _report(state: Adapters, names: Sequence[str], done: Mapping[str, Optimized]) -> PassReport:
    """Returns the report of the passes `names`, from the results `done` by the paths of the regions."""
    labels = {
        (adapted.site.region, node): adapted.site.label
        for adapter in state.acting
        for adapted in state.by_name[adapter].sites
        for nodes in adapted.site.nodes
        for node in nodes
    }
    outcomes = {
        name: [
            (labels.get((region, outcome.site), outcome.site), outcome.reason)
            for region, found in done.items()
            for outcome in found.outcomes[name]
        ]
        for name in names
    }
    return PassReport(
        {name: tuple(dict.fromkeys(site for site, why in found if why is None)) for name, found in outcomes.items()},
        {name: {site: why for site, why in found if why is not None} for name, found in outcomes.items()},
    )
