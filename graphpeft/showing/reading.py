"""Pictures of adapted models, of traces, and of what a config would do.

Modules are a tree, in which modules with equal insides are of one kind. A site has its rule, its tensors, and how much
the weight changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft.adapters import merged_weights
from graphpeft.adapters.adapting import modules_of
from graphpeft.adapters.changes import delta
from graphpeft.adapters.graphs import by_region, with_adapter, without_any
from graphpeft.adapters.merged_weights import Originals
from graphpeft.adapters.plan import Plan
from graphpeft.adapters.state import Adapter, Adapters, adapters_of
from graphpeft.graph.holders import all_parameters, has_tensor, tensor_at
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.paths import join, unwrapped, within
from graphpeft.graph.template import Template, names_in_slots, template_of
from graphpeft.graph.traced_model import TracedModel, stands_for
from graphpeft.learning.norms import norm_of
from graphpeft.progress import over
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.report import Report
from graphpeft.rules.short_options import short_options
from graphpeft.showing.measuring import Costs, measured
from graphpeft.showing.nodes import drawn_graphs, shape_of, told_of
from graphpeft.showing.picture import (
    DrawnAdapter,
    DrawnGraph,
    DrawnModule,
    DrawnRefusal,
    DrawnSite,
    DrawnTensor,
    DrawnTraining,
    Picture,
)
from graphpeft.sites.site import Site
from graphpeft.wording import number_of


def picture_of(shown: nn.Module | Report, example_inputs: ExampleInputs | None = None) -> Picture:
    """Returns the picture of a model, adapted or traced, or of a report of `explain`."""
    if isinstance(shown, Report):
        if example_inputs is not None:
            raise ValueError("a plan has nothing to run a batch with; adapt the model, and show that with the batch")
        return _of_report(shown)
    if isinstance(shown, nn.Module):
        return _of_model(shown, example_inputs)
    raise TypeError(f"show draws a model, a trace or a report of explain, and was given a {type(shown).__name__}")


def _of_model(model: nn.Module, example_inputs: ExampleInputs | None) -> Picture:
    # a compiled model, or one in several copies, has what it wraps
    model = unwrapped(model)
    modules = modules_of(model)
    costs = None if example_inputs is None else measured(model, modules, example_inputs)
    state = adapters_of(model) or Adapters.before_any({})
    names = list(state.by_name)
    originals = merged_weights.Originals(model, state)
    gallery = _Gallery()
    drawn: dict[str, Drawn] = {}
    sites = _sites_by_region(state, modules)
    regions = {path: template for path, module in modules.items() if (template := template_of(module)) is not None}
    for path, template in over(regions.items(), "drawing", "modules"):
        module = modules[path]
        slots = {slot: names.index(name) for slot, name in names_in_slots(module).items() if name in names}
        here = []
        for name, adapted in sites.get(path, []):
            one = drawn_site(adapted, names.index(name), state.slots[name], modules)
            here.append(one if name in state.merged else with_change(one, adapted, modules, originals))
        drawn[path] = Drawn(gallery.place_of(_before(template.plain), template.plain, module), slots, here)
    adapters = [
        _drawn_adapter(name, adapter, _state_of(name, state), modules) for name, adapter in state.by_name.items()
    ]
    tree_of_all = tree(modules, drawn, _trained(state.by_name.values()), costs)
    remark = _why_nothing_is_kept(model, names) if tree_of_all.kept == 0 else ""
    return Picture(_title(model), tree_of_all, gallery.graphs, adapters, remark=remark)


def _before(template: Template) -> Template:
    """Returns a template without adapters and rewrites."""
    return without_any(template) if template.before is None else template.before.template


def _why_nothing_is_kept(model: nn.Module, adapters: list[str]) -> str:
    if any(parameter.requires_grad for parameter in model.parameters()):
        return ""
    mend = "; to measure training, load the adapter with is_trainable=True" if adapters else ""
    return f"nothing is kept for the backward, since no parameter requires a gradient{mend}"


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
    adapter = _drawn_adapter(report.adapter, plan, "planned", plan.modules)
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
            found.setdefault(path, []).append(DrawnTraining(place, f"{number_of(len(rows.indices), 'row')} of weight"))
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


def _drawn_adapter(name: str, adapter: Adapter | Plan, state: str, modules: Mapping[str, nn.Module]) -> DrawnAdapter:
    parameters = sum(adapted.parameter_count for adapted in adapter.sites) + _count_beside(adapter, modules)
    return DrawnAdapter(
        name, adapter.config.method, short_options(adapter.config), state, len(adapter.sites), parameters
    )


def _count_beside(adapter: Adapter | Plan, modules: Mapping[str, nn.Module]) -> int:
    """Returns the number of parameters that an adapter trains of the model's own tensors."""
    counts: dict[Any, int] = {}
    for path, names in adapter.fully_trained.items():
        for name in names:
            own = modules[path]._parameters.get(name) if path in modules else None
            if own is not None:
                counts[id(own) if adapter.config.keeps_tied else (path, name)] = own.numel()
    for path, rows in adapter.rows.items():
        table = modules[path]._parameters.get("weight") if path in modules else None
        if table is not None:
            counts[rows.leader] = len(rows.indices) * table[0].numel()
    return sum(counts.values())


def _state_of(name: str, state: Adapters) -> str:
    if name in state.merged:
        return "merged"
    if name in state.slots:
        return "acts"
    return "disabled" if name in state.active else "rests"


class Drawn(NamedTuple):
    """The parts of one module's forward in a picture.

    Attributes:
        graphs: The place of its graphs among the picture's.
        slots: The place of the adapter in each slot.
        sites: The sites in the graphs.
    """

    graphs: int
    slots: dict[int, int]
    sites: list[DrawnSite]


Trained = Mapping[str, list[DrawnTraining]]
"""Modules' own tensors that adapters train, by the path of the module."""


def tree(
    modules: Mapping[str, nn.Module], drawn: Mapping[str, Drawn], trained: Trained, costs: Costs | None = None
) -> DrawnModule:
    """Returns the module at the root, with all that are inside."""
    inside: dict[str, list[str]] = {path: [] for path in modules}
    for path in modules:
        if path:
            inside[path.rpartition(".")[0]].append(path)
    kinds: dict[Hashable, int] = {}

    def grown(path: str) -> DrawnModule:
        module = modules[path]
        parts = [grown(part) for part in inside[path]]
        own = drawn.get(path)
        sites = own.sites if own is not None else []
        numbers = sum(parameter.numel() for _, parameter in all_parameters(module))
        shapes = tuple(tuple(parameter.shape) for _, parameter in all_parameters(module))
        graphs, slots = (own.graphs, own.slots) if own is not None else (None, {})
        training = trained.get(path, [])
        acting = (graphs, tuple(slots.items()), tuple(training))
        kind = (stands_for(module), shapes, acting, *((part.name, part.kind) for part in parts))
        return DrawnModule(
            name=path.rpartition(".")[2],
            path=path,
            cls=stands_for(module).__name__,
            parameters=numbers + sum(part.parameters for part in parts),
            adapted=len(sites) + len(training) + sum(part.adapted for part in parts),
            kind=kinds.setdefault(kind, len(kinds)),
            graphs=graphs,
            slots=slots,
            sites=sites,
            trained=training,
            inside=parts,
            kept=None if costs is None or path not in costs.seconds else costs.kept.get(path, 0),
            kept_by={} if costs is None else costs.kept_by_node.get(path, {}),
            shapes={} if costs is None else costs.shapes.get(path, {}),
            seconds=None if costs is None else costs.seconds.get(path),
        )

    return grown("")


def drawn_site(adapted: AdaptedSite, adapter: int, slot: int, modules: Mapping[str, nn.Module]) -> DrawnSite:
    """Returns a site of an adapter as a picture has it."""
    site: Any = adapted.site
    owner = modules[site.owner]
    relative = within(site.owner, site.region)
    paths = {name: join(relative, attribute) for name, attribute in adapted.in_slot(slot).items()}
    tensors = [_drawn_tensor(name, paths[name], adapted, owner) for name in adapted.specs]
    return DrawnSite(
        label=site.label,
        op=site.op.__name__,
        size=site.size,
        adapter=adapter,
        nodes=sorted({name for names in site.nodes for name in names}),
        rule=_shown(adapted.rule),
        tensors=tensors,
        merges=adapted.unmergeable or "",
    )


def with_change(
    drawn: DrawnSite, adapted: AdaptedSite, modules: Mapping[str, nn.Module], originals: Originals
) -> DrawnSite:
    """Returns a drawn site with ‖ΔW‖ / ‖W‖, if its adapter changes a weight whose numbers are here."""
    if not isinstance(adapted.site, Site) or adapted.unmergeable is not None or not _is_here(adapted, modules):
        return drawn
    with torch.no_grad():
        place = (adapted.site.owner, adapted.site.attribute)
        weight = originals.get(place, own_parameter(modules[adapted.site.owner], adapted.site.attribute))
        left = adapted.replaced.get(adapted.site.attribute)
        if left is None:
            change = delta(adapted, modules, base=originals.get(place))
        else:
            # one that has taken a part of the weight adds to what it has left of it
            change = own_parameter(modules[adapted.site.owner], left) + delta(adapted, modules) - weight
        base, changed = norm_of(weight), norm_of(change)
    return drawn if base == 0 else dataclasses.replace(drawn, change=changed / base)


def _is_here(adapted: Any, modules: Mapping[str, nn.Module]) -> bool:
    owner = modules[adapted.site.owner]
    names = [name for name in adapted.names.values() if has_tensor(owner, name)]
    tensors = [own_parameter(owner, adapted.site.attribute), *(tensor_at(owner, name) for name in names)]
    return all(type(each) in (torch.Tensor, nn.Parameter) and not each.is_meta for each in tensors)


def _drawn_tensor(name: str, path: str, adapted: AdaptedSite, owner: nn.Module) -> DrawnTensor:
    spec, attribute = adapted.specs[name], adapted.names[name]
    if not has_tensor(owner, attribute):
        sizes = " × ".join(map(str, spec.shape)) or "scalar"
        return DrawnTensor(name, path, f"{sizes}, {str(adapted.dtype).removeprefix('torch.')}", spec.is_trained)
    tensor = tensor_at(owner, attribute)
    gradient = None if tensor.grad is None else norm_of(tensor.grad)
    return DrawnTensor(name, path, shape_of(tensor), tensor.requires_grad, gradient)


def _shown(rule: Any) -> str:
    """Returns a rule with those of its options that aren't the defaults."""
    if not dataclasses.is_dataclass(rule):
        return type(rule).__name__
    given = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    plain = {field.name: field.default for field in dataclasses.fields(rule)}
    options = [f"{name}={value!r}" for name, value in given.items() if value != plain[name]]
    return f"{type(rule).__name__}({', '.join(options)})"
