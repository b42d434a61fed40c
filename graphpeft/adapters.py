"""Puts adapters on a model and takes them off: tensors onto modules, nodes into graphs.

The model's graphs hold the nodes of the active adapters only. A region without any runs its own class's code again, so
a disabled adapter costs nothing. Whatever can fail is done before the first change of the model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from graphpeft import in_place, ops, rewrite, stand_ins
from graphpeft.boundaries import Boundary, boundary_of
from graphpeft.config import PeftConfig
from graphpeft.paths import join, within
from graphpeft.plan import AdaptError, Plan
from graphpeft.report import Report
from graphpeft.rewrite import AdaptedSite
from graphpeft.sites import Site
from graphpeft.tracing.errors import TraceError
from graphpeft.tracing.graph_module import Graphs, Template, template_of, wear_template

Modules = Mapping[str, nn.Module]
"""A model's modules by path."""

Tensors = dict[tuple[str, str], torch.Tensor]
"""Tensors by the path of their module and their name in it."""


@dataclass
class Adapter:
    """One adapter of a model; its tensors live on the modules whose weights they adapt.

    Attributes:
        config: Its config.
        sites: The sites that it adapts.
        whole: The tensors for which it has stand-ins: names by the path of their module.
        report: What was adapted, for a person to read.
    """

    config: PeftConfig
    sites: list[AdaptedSite]
    whole: dict[str, tuple[str, ...]]
    report: Report

    @classmethod
    def of(cls, plan: Plan) -> Adapter:
        """Returns the adapter that `plan` describes."""
        return cls(plan.config, plan.sites, plan.whole, plan.report)

    @property
    def changes_weights(self) -> bool:
        """Whether it can be merged into weights."""
        return len(self.weight_sites) == len(self.sites)

    @property
    def weight_sites(self) -> list[Any]:
        """Those of the sites that are weights."""
        return [adapted for adapted in self.sites if isinstance(adapted.site, Site)]

    @property
    def replaced(self) -> dict[str, tuple[str, ...]]:
        """The tensors for which it has frozen stand-ins: names by the path of their module."""
        found: dict[str, tuple[str, ...]] = {}
        for adapted in self.sites:
            if adapted.replaced:
                found[adapted.site.owner] = (*found.get(adapted.site.owner, ()), *adapted.replaced)
        return found

    @property
    def stand_ins(self) -> dict[str, tuple[str, ...]]:
        """The tensors for which it has stand-ins of either kind."""
        found = dict(self.whole)
        for path, names in self.replaced.items():
            found[path] = (*found.get(path, ()), *names)
        return found

    def frozen_names(self, adapter: str) -> set[tuple[str, str]]:
        """Returns the module's path and the name of each tensor of this adapter that is never trained."""
        frozen = {
            (adapted.site.owner, adapted.names[name])
            for adapted in self.sites
            for name, spec in adapted.specs.items()
            if not spec.is_trained
        }
        return frozen | {
            (path, stand_ins.stand_in(name, adapter)) for path, names in self.replaced.items() for name in names
        }

    def tensor_names(self, adapter: str) -> Iterator[tuple[str, str]]:
        """Yields the module's path and the name of every tensor of this adapter."""
        for adapted in self.sites:
            for name in adapted.specs:
                yield adapted.site.owner, adapted.names[name]
        for path, names in self.stand_ins.items():
            for name in names:
                yield path, stand_ins.stand_in(name, adapter)


@dataclass
class Adapters:
    """All adapters of a model.

    Attributes:
        by_name: The adapters.
        active: The names of those that act unless they are disabled, in the order in which they were activated.
        acting: The names of those whose nodes are in the graphs: the active ones, or none.
        is_disabled: Whether none acts, whichever are active.
        lifted: The graphs of the regions that were no graph modules before, by path.
        trained_before: The parameters that required grad before the first adapter came, by the path of their module and
            their name.
    """

    trained_before: list[tuple[str, str]]
    by_name: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    lifted: dict[str, Template] = field(default_factory=dict)
    acting: list[str] = field(default_factory=list)
    is_disabled: bool = False

    @classmethod
    def before_any(cls, modules: Modules) -> Adapters:
        """Returns the adapters of a model that has none yet."""
        trained = [
            (path, name)
            for path, module in modules.items()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        return cls(trained)

    def owned(self) -> frozenset[str]:
        """Returns the paths of all tensors of adapters."""
        return frozenset(
            join(path, name)
            for adapter, content in self.by_name.items()
            for path, name in content.tensor_names(adapter)
        )


def add(modules: Modules, adapters: Adapters, name: str, plan: Plan, values: Tensors | None = None) -> None:
    """Puts the adapter of `plan` on a model, inactive; its tensors require grad unless it is for inference.

    Args:
        modules: The model's modules by path.
        adapters: Its adapters, to which this one is added.
        name: The adapter's name.
        plan: What `make_plan` worked out.
        values: Values of all its tensors; without them the method's first values are drawn.

    Raises:
        AdaptError: If a tensor's name is taken; the model is as it was.
    """
    made = _site_tensors(plan, modules, values) | _whole_tensors(plan, name, modules, values)
    for path, attribute in made:
        if _has(modules[path], attribute):
            where = path or "the model"
            raise AdaptError(f"{where} has an attribute {attribute!r} already; choose another adapter name")
    if plan.config.inference_mode:
        for tensor in made.values():
            tensor.requires_grad_(False)
    for (path, attribute), tensor in made.items():
        # not isinstance, which is slow for parameters
        if type(tensor) is nn.Parameter:
            modules[path]._parameters[attribute] = tensor
        else:
            modules[path].register_buffer(attribute, tensor)
    for adapted in plan.sites:
        for constant, value in adapted.constants.items():
            modules[adapted.site.owner].__dict__[adapted.names[constant]] = value
    for region, template in plan.templates.items():
        if template_of(modules[region]) is None:
            adapters.lifted.setdefault(region, template)
    adapters.by_name[name] = Adapter.of(plan)


def _has(module: nn.Module, name: str) -> bool:
    held = (module.__dict__, module._parameters, module._buffers, module._modules)
    return any(name in names for names in held) or hasattr(type(module), name)


@torch.no_grad()
def _site_tensors(plan: Plan, modules: Modules, values: Tensors | None) -> Tensors:
    made: Tensors = {}
    for adapted in plan.sites:
        site = adapted.site
        beside, attribute = site.beside
        device = _device(modules[beside]._parameters[attribute])
        drawn: Mapping[str, torch.Tensor] = {}
        replacing: Mapping[str, torch.Tensor] = {}
        if values is None or adapted.replaced:
            drawn, replacing = _first_values(adapted, plan.config, modules[beside], device)
        if values is not None:
            drawn = {local: values[site.owner, adapted.names[local]] for local in adapted.specs}
        for own, tensor in replacing.items():
            made[site.owner, adapted.replaced[own]] = nn.Parameter(tensor, requires_grad=False)
        for local, tensor in drawn.items():
            made[site.owner, adapted.names[local]] = nn.Parameter(
                tensor.to(device, adapted.dtype), adapted.specs[local].is_trained
            )
    return made


def _first_values(
    adapted: AdaptedSite, config: PeftConfig, module: nn.Module, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the first values of a site's parameters, and the tensors that its module reads in place of its own."""
    own = {name: _own(module, name) for name in adapted.replaced}
    if device.type == "meta":
        drawn = {local: torch.empty(spec.shape, device=device) for local, spec in adapted.specs.items()}
        return drawn, {name: torch.empty_like(tensor) for name, tensor in own.items()}
    # drawn on the CPU and in the default dtype wherever the weight is, as PEFT does: equal seeds, equal values
    drawn = {local: torch.empty(*spec.shape) for local, spec in adapted.specs.items()}
    given = adapted.rule.initialise(drawn, adapted.site, config, module) or {}
    replacing = {name: given[name].to(tensor.device, tensor.dtype) for name, tensor in own.items()}
    if adapted.site.dtype == torch.get_default_dtype():
        return drawn, replacing
    # through the weight's dtype, in which PEFT has them for a moment
    return {local: tensor.to(adapted.site.dtype) for local, tensor in drawn.items()}, replacing


def _own(module: nn.Module, name: str) -> torch.Tensor:
    """Returns a module's parameter itself, whatever is read in its place."""
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def _device(weight: torch.Tensor | None) -> torch.device:
    assert weight is not None
    return weight.device


def _whole_tensors(plan: Plan, name: str, modules: Modules, values: Tensors | None) -> Tensors:
    made: Tensors = {}
    for path, names in plan.whole.items():
        for attribute, tensor in stand_ins.create(modules[path], names, name).items():
            made[path, attribute] = tensor
            if values is not None:
                tensor.data.copy_(values[path, attribute])
    return made


def activate(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Makes exactly the adapters `names` act, now or when they are no longer disabled.

    Raises:
        AdaptError: If two of them have stand-ins for the same tensor; the model is as it was.
    """
    wanted = list(dict.fromkeys(names))
    _stand_in_readers(adapters, wanted)
    _let_act(modules, adapters, [] if adapters.is_disabled else wanted)
    adapters.active = wanted


def disable(modules: Modules, adapters: Adapters, is_disabled: bool) -> None:
    """Lets no adapter act, or the active ones again."""
    _let_act(modules, adapters, [] if is_disabled else adapters.active)
    adapters.is_disabled = is_disabled


def _let_act(modules: Modules, adapters: Adapters, wanted: list[str]) -> None:
    stand_in_readers = _stand_in_readers(adapters, wanted)
    templates = _templates(adapters, wanted, modules)
    for region, template in templates.items():
        if template is None:
            in_place.take_off(modules[region], "graph")
        else:
            wear_template(modules[region], template)
    for path in {path for adapter in adapters.by_name.values() for path in adapter.stand_ins} & modules.keys():
        if path in stand_in_readers:
            stand_ins.read(modules[path], stand_in_readers[path])
        else:
            stand_ins.read_own(modules[path])
    adapters.acting = wanted


def _stand_in_readers(adapters: Adapters, wanted: list[str]) -> dict[str, dict[str, str]]:
    """Returns the adapter whose stand-in is read for a tensor, by the path of its module and its name."""
    readers: dict[str, dict[str, str]] = {}
    for name in wanted:
        for path, names in adapters.by_name[name].stand_ins.items():
            for own in names:
                other = readers.setdefault(path, {}).setdefault(own, name)
                if other != name:
                    do = _both_do(adapters.by_name[other], adapters.by_name[name], path, own)
                    raise AdaptError(f"{other!r} and {name!r} both {do}; only one of them can be active")
    return readers


def _both_do(one: Adapter, other: Adapter, path: str, name: str) -> str:
    if all(name in adapter.whole.get(path, ()) for adapter in (one, other)):
        return f"train {path} whole"
    return f"have another tensor in the place of {join(path, name)}"


def _templates(adapters: Adapters, wanted: list[str], modules: Modules) -> dict[str, Template | None]:
    """Returns the template that each region is to wear, or None where it is to run its own code."""
    leaving = [name for name in adapters.acting if name not in wanted]
    coming = [name for name in wanted if name not in adapters.acting]
    by_region = {name: _by_region(adapters.by_name[name].sites, modules) for name in {*leaving, *wanted}}
    templates: dict[str, Template | None] = {}
    for name in leaving:
        for region in by_region[name]:
            worn = templates.get(region) or _worn(adapters, region, modules)
            templates[region] = worn.derive(("without", name), functools.partial(_remove, name=name))
    for name in coming:
        for region, sites in by_region[name].items():
            worn = templates.get(region) or _worn(adapters, region, modules)
            templates[region] = _with_adapter(worn, modules[region], name, adapters.by_name[name], region, sites)
    needed = {region for name in wanted for region in by_region[name]}
    # a graph that its owner has edited is not thrown away for being without adapters
    return {
        region: None
        if region in adapters.lifted and region not in needed and template and template.shared
        else template
        for region, template in templates.items()
    }


def _by_region(sites: list[AdaptedSite], modules: Modules) -> dict[str, list[AdaptedSite]]:
    """Groups sites by their region; a region that somebody has taken out of the model is left out."""
    regions: dict[str, list[AdaptedSite]] = {}
    for adapted in sites:
        if adapted.site.region in modules:
            regions.setdefault(adapted.site.region, []).append(adapted)
    return regions


def _worn(adapters: Adapters, region: str, modules: Modules) -> Template:
    return template_of(modules[region]) or adapters.lifted[region]


def _with_adapter(
    worn: Template, module: nn.Module, name: str, adapter: Adapter, region: str, sites: list[AdaptedSite]
) -> Template:
    """Returns `worn` with the nodes of one adapter at its sites in this region."""
    edits = tuple(
        (adapted.site.op, adapted.site.nodes, adapted.rule, _attributes(adapted, region)) for adapted in sites
    )

    def edit(graphs: Graphs) -> None:
        for index, graph in enumerate(graphs):
            named = {node.name: node for node in graph.nodes}
            for kind, nodes, rule, attributes in edits:
                for node in nodes[index]:
                    # read anew each time: an edit before this one may have given the operation another input
                    op = _boundary(graph, node) if kind is Boundary else _op_at(named.get(node), kind, module, region)
                    rewrite.insert(graph, op, rule, dict(attributes), name, adapter.config.peft_type.value)

    derived = worn.derive(("with", name, edits), edit)
    derived.remember(("without", name), worn)
    return derived


def _boundary(graph: fx.Graph, name: str) -> Boundary:
    try:
        return boundary_of(graph, name)
    except TraceError as error:
        raise AdaptError(f"the boundary of an adapted module is gone: {error}; unload its adapters first") from error


def _op_at(node: fx.Node | None, kind: type, module: nn.Module, region: str) -> ops.Operation:
    op = None
    if node is not None:
        op = ops.weight_at(node) if kind is ops.Weight else ops.read_op(node, module)
    if op is None:
        raise AdaptError(
            f"the graph of {region or 'the model'} was exchanged since it was adapted, and lacks an adapted operation; "
            "unload the adapters before you assign a graph"
        )
    return op


def _remove(graphs: Graphs, name: str) -> None:
    for graph in graphs:
        rewrite.remove(graph, name)


def _attributes(adapted: AdaptedSite, region: str) -> tuple[tuple[str, str], ...]:
    owner = adapted.site.owner
    if owner == region:
        return (*adapted.names.items(), *adapted.site.reads)
    relative = within(owner, region)
    names = tuple((local, join(relative, attribute)) for local, attribute in adapted.names.items())
    return (*names, ("training", join(relative, "training")))


def remove(modules: Modules, adapters: Adapters, name: str) -> None:
    """Takes an adapter and its tensors off the model."""
    activate(modules, adapters, [other for other in adapters.active if other != name])
    adapter = adapters.by_name.pop(name)
    # tolerant of what is no longer there: somebody may have put another module in the place of an adapted one
    present = {path: modules[path] for path, _ in adapter.tensor_names(name) if path in modules}
    for path, attribute in adapter.tensor_names(name):
        if path in present and hasattr(present[path], attribute):
            delattr(present[path], attribute)
    for adapted in adapter.sites:
        for constant in adapted.constants:
            if adapted.site.owner in present:
                present[adapted.site.owner].__dict__.pop(adapted.names[constant], None)


def merge(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Adds the changes of adapters to the weights, and writes their stand-ins over the tensors themselves.

    Raises:
        AdaptError: If a weight is tied to another one, which would change too, or two adapters have stand-ins for the
            same tensor; nothing is merged.
    """
    merged = list(dict.fromkeys(names))
    for name in merged:
        _refuse_unmergeable(adapters.by_name[name], name)
    _stand_in_readers(adapters, merged)
    for name in merged:
        refuse_missing(modules, adapters.by_name[name], name)
        _refuse_tied(modules, adapters.by_name[name])
    with torch.no_grad():
        # these first, since they are what the changes are changes of
        for name in merged:
            for path, own_names in adapters.by_name[name].stand_ins.items():
                for own, other in stand_ins.own_and_stand_in(modules[path], own_names, name):
                    own.copy_(other)
        for sites in _by_weight(adapters, merged).values():
            _merge_into_weight(sites, modules)


def _by_weight(adapters: Adapters, names: list[str]) -> dict[str, list[AdaptedSite]]:
    """Groups the sites of adapters by their weight."""
    found: dict[str, list[AdaptedSite]] = {}
    for name in names:
        for adapted in adapters.by_name[name].weight_sites:
            found.setdefault(adapted.site.weight, []).append(adapted)
    return found


def _merge_into_weight(sites: list[AdaptedSite], modules: Modules) -> None:
    """Adds the changes of one weight, and of the bias beside it."""
    site = sites[0].site
    assert isinstance(site, Site)
    weight = _own(modules[site.owner], site.attribute)
    base = weight if len(sites) == 1 else weight.clone()
    for adapted in sites:
        weight += delta(adapted, modules, weight, base).to(weight.dtype)
        change = bias_delta(adapted, modules)
        if change is not None:
            bias = _bias_of(adapted, modules)
            bias += change.to(bias.dtype)


@torch.no_grad()
def refuse_infinite(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Raises AdaptError if a weight's change isn't finite."""
    for name in names:
        for adapted in adapters.by_name[name].weight_sites:
            changes = {adapted.site.weight: delta(adapted, modules), adapted.site.bias: bias_delta(adapted, modules)}
            for path, change in changes.items():
                if change is not None and not torch.isfinite(change).all():
                    raise AdaptError(f"the change of {path} by adapter {name!r} isn't finite")


def _refuse_unmergeable(adapter: Adapter, name: str) -> None:
    if not adapter.changes_weights:
        raise AdaptError(
            f"adapter {name!r} changes what modules are given, not weights, so it can't be merged; keep it, or take it "
            "off with unload()"
        )
    for adapted in adapter.weight_sites:
        reason = adapted.rule.unmergeable(adapted.site)
        if reason is not None:
            raise AdaptError(
                f"{adapted.site.name} of adapter {name!r} can't be merged: {reason}; take it off with unload()"
            )


def refuse_missing(modules: Modules, adapter: Adapter, name: str) -> None:
    """Raises AdaptError if a tensor of an adapter is no longer on the model."""
    for path, attribute in adapter.tensor_names(name):
        if path not in modules or not hasattr(modules[path], attribute):
            raise AdaptError(
                f"{join(path, attribute)} of adapter {name!r} is gone, since its module was replaced; put "
                "it back, or delete the adapter"
            )
        in_place.layers_of(modules[path])


def _refuse_tied(modules: Modules, adapter: Adapter) -> None:
    holders: dict[int, list[str]] = {}
    for path, module in modules.items():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                holders.setdefault(id(tensor), []).append(join(path, name))
    changed = [(adapted.site.owner, adapted.site.attribute) for adapted in adapter.weight_sites]
    biases = [adapted.site.bias for adapted in adapter.weight_sites if bias_delta(adapted, modules) is not None]
    changed += [(path, name) for path, _, name in (bias.rpartition(".") for bias in biases)]
    changed += [(path, name) for path, names in adapter.stand_ins.items() for name in names]
    for path, name in changed:
        tied = [
            other for other in holders.get(id(modules[path]._parameters.get(name)), ()) if other != join(path, name)
        ]
        if tied:
            raise AdaptError(
                f"{join(path, name)} is tied to {', '.join(tied)}, which merging would change too; give one of them a "
                "parameter of its own before adapting"
            )


def delta(
    adapted: AdaptedSite, modules: Modules, weight: torch.Tensor | None = None, base: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the change of a site's weight, in the shape in which it is stored.

    Args:
        adapted: The site with its rule.
        modules: The model's modules by path.
        weight: The weight with the changes of adapters before this one; what the module reads if None.
        base: The weight without them; likewise.
    """
    own = _read_weight(adapted, modules) if base is None else base
    return _asked(adapted.rule.delta, adapted, modules, weight=own if weight is None else weight, base=own)


def bias_delta(adapted: AdaptedSite, modules: Modules) -> torch.Tensor | None:
    """Returns the change of the bias that a site's operations add, or None if it doesn't change."""
    function = getattr(adapted.rule, "bias_delta", None)
    return _asked(function, adapted, modules) if function is not None else None


def _asked(function: Any, adapted: AdaptedSite, modules: Modules, **weights: torch.Tensor) -> Any:
    """Calls a rule's function with what it asks for by the names of its arguments; None for what there isn't."""
    owner = modules[adapted.site.owner]
    values = {local: getattr(owner, adapted.names[local]) for local in adapted.names} | weights
    return function(**{name: values.get(name) for name in inspect.signature(function).parameters})


def _read_weight(adapted: AdaptedSite, modules: Modules) -> torch.Tensor:
    """Returns the weight that the site's module reads while the adapter acts."""
    assert isinstance(adapted.site, Site)
    attribute = adapted.site.attribute
    return _own(modules[adapted.site.owner], adapted.replaced.get(attribute, attribute))


def _bias_of(adapted: AdaptedSite, modules: Modules) -> torch.Tensor:
    assert isinstance(adapted.site, Site)
    assert adapted.site.bias is not None
    path, _, name = adapted.site.bias.rpartition(".")
    return _own(modules[path], name)


def freeze(modules: Modules, adapters: Adapters) -> None:
    """Freezes the parameters of the base."""
    for path, name in adapters.trained_before:
        parameter = modules[path]._parameters[name]
        assert parameter is not None
        parameter.requires_grad_(False)


def thaw(modules: Modules, adapters: Adapters) -> None:
    """Makes those parameters require grad that did before the first adapter came, and no others."""
    trained = set(adapters.trained_before)
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameter.requires_grad_((path, name) in trained)


def set_trainable(modules: Modules, adapters: Adapters) -> None:
    """Makes the tensors of active adapters require grad, and those of the others not; the base's stay as they are."""
    for name, adapter in adapters.by_name.items():
        trains = name in adapters.active and not adapter.config.inference_mode
        frozen = adapter.frozen_names(name)
        for path, attribute in adapter.tensor_names(name):
            # somebody may have put another module in the place of an adapted one
            parameter = modules[path]._parameters.get(attribute) if path in modules else None
            wanted = trains and (path, attribute) not in frozen
            if parameter is not None and parameter.requires_grad != (wanted and parameter.is_floating_point()):
                parameter.requires_grad_(wanted)
