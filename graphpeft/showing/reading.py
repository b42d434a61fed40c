"""Pictures of adapted models, of traces, and of what a config would do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from tqdm import tqdm

from graphpeft.adapters.adapting import modules_of
from graphpeft.adapters.graphs import by_region, with_adapter, without_any
from graphpeft.adapters.plan import Plan
from graphpeft.adapters.state import Adapter, Adapters, adapters_of
from graphpeft.graph.template import Template, names_in_slots, template_of
from graphpeft.graph.traced_model import TracedModel, stands_for
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.report import Report
from graphpeft.rules.short_options import short_options
from graphpeft.showing.nodes import drawn_graphs, told_of
from graphpeft.showing.picture import DrawnAdapter, DrawnGraph, DrawnRefusal, DrawnTraining, Picture
from graphpeft.showing.sites import drawn_site, with_change
from graphpeft.showing.tree import Drawn, tree


def picture_of(shown: nn.Module | Report) -> Picture:
    """Returns the picture of a model, adapted or traced, or of a report of `explain`.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(shown, Report):
        return _of_report(shown)
    if isinstance(shown, nn.Module):
        return _of_model(shown)
    raise TypeError(f"show draws a model, a trace or a report of explain, and was given a {type(shown).__name__}")


def _of_model(model: nn.Module) -> Picture:
    modules = modules_of(model)
    state = adapters_of(model) or Adapters.before_any({})
    names = list(state.by_name)
    gallery = _Gallery()
    drawn: dict[str, Drawn] = {}
    sites = _sites_by_region(state, modules)
    regions = {path: template for path, module in modules.items() if (template := template_of(module)) is not None}
    for path, template in tqdm(regions.items(), desc="drawing", delay=2, leave=False):
        module = modules[path]
        slots = {slot: names.index(name) for slot, name in names_in_slots(module).items() if name in names}
        here = []
        for name, adapted in sites.get(path, []):
            one = drawn_site(adapted, names.index(name), state.slots[name], modules)
            here.append(one if name in state.merged else with_change(one, adapted, modules))
        drawn[path] = Drawn(gallery.place_of(without_any(template.plain), template.plain, module), slots, here)
    adapters = [_drawn_adapter(name, adapter, _state_of(name, state)) for name, adapter in state.by_name.items()]
    return Picture(_title(model), tree(modules, drawn, _trained(state.by_name.values())), gallery.graphs, adapters)


def _of_report(report: Report) -> Picture:
    plan: Plan | None = report.plan
    if plan is None:
        raise ValueError(
            "the report is of an adapter that a model has, and knows no graphs; show the model itself, or what explain "
            "returns"
        )
    slot, gallery = 0, _Gallery()
    drawn: dict[str, Drawn] = {}
    for region, adapted in by_region(plan.sites, plan.modules).items():
        module, worn = plan.modules[region], plan.templates[region]
        before = without_any(worn)
        after = with_adapter(before, module, slot, plan.config.method, region, adapted)
        here = [drawn_site(each, 0, slot, plan.modules) for each in adapted]
        drawn[region] = Drawn(gallery.place_of(before, after, module), {slot: 0}, here)
    refused = [DrawnRefusal(*refusal) for refusal in report.refused]
    adapter = DrawnAdapter(
        report.adapter,
        report.method,
        short_options(plan.config),
        "planned",
        len(plan.sites),
        sum(adapted.parameter_count for adapted in plan.sites),
    )
    model = plan.modules[""]
    return Picture(
        f"{_title(model)}: the plan of {report.adapter!r}",
        tree(plan.modules, drawn, _trained([plan])),
        gallery.graphs,
        [adapter],
        refused,
        report.excluded,
    )


def _trained(adapters: Iterable[Adapter | Plan]) -> dict[str, list[DrawnTraining]]:
    """Returns what adapters train of modules' own tensors, by the path of the module."""
    found: dict[str, list[DrawnTraining]] = {}
    for place, adapter in enumerate(adapters):
        for path, names in adapter.fully_trained.items():
            found.setdefault(path, []).append(DrawnTraining(place, ", ".join(names)))
        for path, rows in adapter.rows.items():
            found.setdefault(path, []).append(DrawnTraining(place, f"{len(rows.indices)} rows of weight"))
    return found


def _title(model: nn.Module) -> str:
    name = stands_for(model).__name__
    return f"a trace of {name}" if isinstance(model, TracedModel) else name


class _Gallery:
    """The graphs of a picture, each once."""

    def __init__(self) -> None:
        self.graphs: list[list[DrawnGraph]] = []
        self._places: dict[tuple[Template, Template, tuple[str, ...]], int] = {}
        self._by_content: dict[str, int] = {}

    def place_of(self, before: Template, after: Template, module: nn.Module) -> int:
        """Returns the place of the graphs of `module` without and with adapters."""
        # modules of other sizes may share a template
        key = (before, after, told_of(module, (*before.graphs, *after.graphs)))
        if key not in self._places:
            drawn = drawn_graphs(before.graphs, after.graphs, module)
            place = self._by_content.setdefault(repr(drawn), len(self.graphs))
            if place == len(self.graphs):
                self.graphs.append(drawn)
            self._places[key] = place
        return self._places[key]


def _sites_by_region(state: Adapters, modules: Mapping[str, nn.Module]) -> dict[str, list[tuple[str, AdaptedSite]]]:
    """Returns the sites of the adapters that act, with the adapters' names, by region."""
    found: dict[str, list[tuple[str, AdaptedSite]]] = {}
    for name in state.slots:
        for region, sites in by_region(state.by_name[name].sites, modules).items():
            found.setdefault(region, []).extend((name, adapted) for adapted in sites)
    return found


def _drawn_adapter(name: str, adapter: Adapter, state: str) -> DrawnAdapter:
    parameters = sum(adapted.parameter_count for adapted in adapter.sites)
    return DrawnAdapter(
        name, adapter.config.method, short_options(adapter.config), state, len(adapter.sites), parameters
    )


def _state_of(name: str, state: Adapters) -> str:
    if name in state.merged:
        return "merged"
    if name in state.slots:
        return "acts"
    return "disabled" if name in state.active else "rests"
