"""Puts adapters on a model and takes them off: tensors onto modules, nodes into graphs.

The model's graphs hold the nodes of the active adapters only. A region without any runs its own class's code again, so
a disabled adapter costs nothing. Whatever can fail is done before the first change of the model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from graphpeft import in_place, ops, passes, rewrite, stand_ins
from graphpeft.boundaries import Boundary, Leaf, boundary_of, leaf_of
from graphpeft.config import PeftConfig
from graphpeft.paths import TensorPaths, join, within
from graphpeft.plan import HALVES, AdaptError, Plan, dtype_of_adapter
from graphpeft.replication import Replication
from graphpeft.report import Report, listed
from graphpeft.rewrite import AdaptedSite
from graphpeft.sites import Site
from graphpeft.tracing.errors import TraceError
from graphpeft.tracing.graph_module import Graphs, Template, template_of, wear_template
from graphpeft.trained_whole import TrainedRows

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
        rows: The weights of which it has rows, by the path of their module.
        overwritten: What the model's own tensors were before those in the adapter's file were put in their places.
    """

    config: PeftConfig
    sites: list[AdaptedSite]
    whole: dict[str, tuple[str, ...]]
    report: Report
    rows: dict[str, TrainedRows] = field(default_factory=dict)
    overwritten: Tensors = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan) -> Adapter:
        """Returns the adapter that `plan` describes."""
        return cls(plan.config, plan.sites, plan.whole, plan.report, plan.rows)

    @property
    def changes_weights(self) -> bool:
        """Whether it can be merged into weights."""
        return all(unmergeable(adapted) is None for adapted in self.sites)

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
        for path in self.rows:
            yield path, stand_ins.rows(adapter)


class Cache(dict[Any, Any]):
    """What can be worked out again, and is of no use to a copy or a pickle: it begins empty there."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, ()


@dataclass
class Adapters:
    """All adapters of a model.

    Attributes:
        by_name: The adapters.
        active: The names of those that act unless they are disabled, in the order in which they were activated.
        acting: The names of those whose nodes are in the graphs: the active ones that aren't merged, or none.
        read: The names of those whose stand-ins are read: the active ones, or none.
        is_disabled: Whether none acts, whichever are active.
        lifted: The graphs of the regions that were no graph modules before, by path.
        merged: The names of those whose changes are in the weights, in the order in which they were added.
        originals: The weights without any of these changes.
        mixing: How regions run on a batch with several adapters, by what these have in common.
        signatures: What each adapter has in common with others in that, by its name.
        mixable: The paths of the regions that can run so.
        owned: The paths of all tensors of adapters.
        passes: The names of the passes that change how the graphs compute.
        trained_before: The parameters that required grad before the first adapter came, by the path of their module and
            their name.
        replication: How the model's layers were exchanged for an adapter.
    """

    trained_before: list[tuple[str, str]]
    by_name: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    lifted: dict[str, Template] = field(default_factory=dict)
    acting: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    originals: Tensors = field(default_factory=dict)
    mixing: Cache = field(default_factory=Cache)
    signatures: Cache = field(default_factory=Cache)
    mixable: set[str] = field(default_factory=set)
    owned: TensorPaths = field(default_factory=TensorPaths)
    is_disabled: bool = False
    replication: Replication | None = None
    passes: tuple[str, ...] = ()

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
    with _with_originals(modules, adapters):
        made = _site_tensors(plan, modules, values) | _whole_tensors(plan, name, modules, values)
        made |= _row_tensors(plan, name, modules, values)
    for path, attribute in made:
        if _has(modules[path], attribute):
            where = path or "the model"
            raise AdaptError(f"{where} has an attribute {attribute!r} already; choose another adapter name")
    if plan.config.inference_mode:
        for tensor in made.values():
            tensor.requires_grad_(False)
    for (path, attribute), tensor in made.items():
        adapters.owned.add(path, attribute)
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
    own = {place: value for place, value in (values or {}).items() if place not in made}
    overwrite(modules, adapters.by_name[name], name, own)


@torch.no_grad()
def overwrite(modules: Modules, adapter: Adapter, name: str, values: Tensors) -> None:
    """Gives tensors of an adapter other values, and tensors of the model's own, which are put back when it goes."""
    of_adapter = set(adapter.tensor_names(name))
    for (path, attribute), value in values.items():
        kinds = (modules[path]._parameters, modules[path]._buffers)
        tensor = next(kind[attribute] for kind in kinds if attribute in kind)
        assert tensor is not None
        if (path, attribute) not in of_adapter:
            adapter.overwritten.setdefault((path, attribute), tensor.clone())
        tensor.copy_(value)


def forget_mixing(adapters: Adapters) -> None:
    """Forgets how regions run on a mixed batch, since other modules or graphs may be there."""
    adapters.mixing.clear()
    adapters.signatures.clear()


def _has(module: nn.Module, name: str) -> bool:
    held = (module.__dict__, module._parameters, module._buffers, module._modules)
    return any(name in names for names in held) or hasattr(type(module), name)


def first_values(plan: Plan, modules: Modules) -> Tensors:
    """Draws the first values of the tensors at the sites of `plan`, and puts them nowhere."""
    return _site_tensors(plan, modules, None)


@torch.no_grad()
def _site_tensors(plan: Plan, modules: Modules, values: Tensors | None) -> Tensors:
    made: Tensors = {}
    for adapted in plan.sites:
        site = adapted.site
        beside, attribute = site.beside
        device = _device(modules[beside]._parameters.get(attribute))
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
    for other in adapted.site.redrawn:
        rule: Any = config.rule_for(other, adapted.dtype)
        discarded = {local: torch.empty(*spec.shape) for local, spec in rule.parameters(other, config).items()}
        rule.initialise(discarded, other, config, module)
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
    # a model without any parameter, such as a quantised one, tells no device
    return torch.get_default_device() if weight is None else weight.device


def _whole_tensors(plan: Plan, name: str, modules: Modules, values: Tensors | None) -> Tensors:
    made: Tensors = {}
    for path, names in plan.whole.items():
        for attribute, tensor in stand_ins.create(modules[path], names, name).items():
            made[path, attribute] = tensor
            if values is not None:
                tensor.data.copy_(values[path, attribute])
    return made


def _row_tensors(plan: Plan, name: str, modules: Modules, values: Tensors | None) -> Tensors:
    """Returns the rows that are trained; those that follow another module have its very tensor."""
    made: Tensors = {}
    for path, rows in plan.rows.items():
        if rows.leader == path:
            table = modules[path]._parameters["weight"]
            assert table is not None
            place = path, stand_ins.rows(name)
            first = table.detach()[list(rows.indices)] if values is None else values[place].to(table.device)
            made[place] = nn.Parameter(first.to(dtype_of_adapter(table.dtype, plan.autocast), copy=True))
    for path, rows in plan.rows.items():
        made[path, stand_ins.rows(name)] = made[rows.leader, stand_ins.rows(name)]
    return made


def activate(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Makes exactly the adapters `names` act, now or when they are no longer disabled.

    Raises:
        AdaptError: If two of them have stand-ins for the same tensor; the model is as it was.
    """
    wanted = list(dict.fromkeys(names))
    _stand_in_readers(adapters, wanted)
    if wanted != adapters.active:
        _unmerge_first(modules, adapters)
    _let_act(modules, adapters, [] if adapters.is_disabled else wanted)
    adapters.active = wanted


def disable(modules: Modules, adapters: Adapters, is_disabled: bool) -> None:
    """Lets no adapter act, or the active ones again; what is merged is unmerged first."""
    if is_disabled:
        unmerge(modules, adapters)
    _let_act(modules, adapters, [] if is_disabled else adapters.active)
    adapters.is_disabled = is_disabled


def optimize(modules: Modules, adapters: Adapters, names: tuple[str, ...]) -> dict[str, passes.Optimized]:
    """Lets the graphs of the adapters that act compute by other passes than before.

    Args:
        modules: The model's modules by path.
        adapters: Its adapters.
        names: The names of passes, in their order.

    Returns:
        What became of the graph of each region that has such adapters, by path.
    """
    regions = dict.fromkeys(
        region for name in adapters.acting for region in _by_region(adapters.by_name[name].sites, modules)
    )
    done = {region: passes.optimized(_worn(adapters, region, modules), modules[region], names) for region in regions}
    for region, optimized in done.items():
        wear_template(modules[region], optimized.template)
    adapters.passes = names
    return done


def _unmerge_first(modules: Modules, adapters: Adapters) -> None:
    if adapters.merged:
        warnings.warn(f"{listed(adapters.merged)} are merged, and unmerged before other adapters act", stacklevel=4)
        unmerge(modules, adapters)


def _let_act(modules: Modules, adapters: Adapters, wanted: list[str]) -> None:
    stand_in_readers = _stand_in_readers(adapters, wanted)
    in_graphs = [name for name in wanted if name not in adapters.merged]
    templates = _templates(adapters, in_graphs, modules)
    worn = {
        region: template and passes.optimized(template, modules[region], adapters.passes).template
        for region, template in templates.items()
    }
    for region, template in worn.items():
        if template is None:
            in_place.take_off(modules[region], "graph")
        else:
            wear_template(modules[region], template)
    row_readers = _row_readers(adapters, wanted)
    changing = [adapters.by_name[name] for name in (*adapters.read, *wanted)]
    paths = {path for adapter in changing for path in (*adapter.stand_ins, *adapter.rows)}
    for path in paths & modules.keys():
        if path in stand_in_readers or path in row_readers:
            others = {own: stand_ins.stand_in(own, name) for own, name in stand_in_readers.get(path, {}).items()}
            stand_ins.read(modules[path], others, tuple(row_readers.get(path, ())))
        else:
            stand_ins.read_own(modules[path])
    adapters.acting, adapters.read = in_graphs, wanted


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
    _row_readers(adapters, wanted)
    return readers


def _row_readers(adapters: Adapters, wanted: list[str]) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Returns which rows are read of each weight; refuses what two adapters both have."""
    readers: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name in wanted:
        for path, rows in adapters.by_name[name].rows.items():
            before = {index for _, indices in readers.get(path, ()) for index in indices}
            whole = [other for other in wanted if "weight" in adapters.by_name[other].stand_ins.get(path, ())]
            if whole or not before.isdisjoint(rows.indices):
                raise AdaptError(
                    f"{name!r} and another of {wanted} both train rows of {path}; only one of them can be active"
                )
            readers.setdefault(path, []).append((stand_ins.rows(name), rows.indices))
    return readers


def _both_do(one: Adapter, other: Adapter, path: str, name: str) -> str:
    if all(name in adapter.whole.get(path, ()) for adapter in (one, other)):
        return f"train {path} whole"
    return f"have another tensor in the place of {join(path, name)}"


def _templates(adapters: Adapters, wanted: list[str], modules: Modules) -> dict[str, Template | None]:
    """Returns the template that each region is to wear, or None where it is to run its own code."""
    # nodes come in the order of activation, since a change may be of what adapters before it have made
    there = [name for name in adapters.acting if name in wanted]
    kept = [name for name, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(there, wanted, strict=False))]
    leaving = [name for name in adapters.acting if name not in kept]
    coming = wanted[len(kept) :]
    by_region = {name: _by_region(adapters.by_name[name].sites, modules) for name in {*leaving, *wanted}}
    templates: dict[str, Template | None] = {}
    for name in leaving:
        for region in by_region[name]:
            worn = templates.get(region) or _worn(adapters, region, modules)
            templates[region] = without(worn, name)
    for name in coming:
        for region, sites in by_region[name].items():
            worn = templates.get(region) or _worn(adapters, region, modules)
            templates[region] = with_adapter(worn, modules[region], name, adapters.by_name[name], region, sites)
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


def without(worn: Template, name: str) -> Template:
    """Returns `worn` without the nodes of an adapter."""
    return worn.derive(("without", name), functools.partial(_remove, name=name))


def with_adapter(
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
                    op = op_in(graph, named, node, kind, module, region)
                    rewrite.insert(graph, op, rule, dict(attributes), name, adapter.config.method)

    derived = worn.derive(("with", name, edits), edit)
    derived.remember(("without", name), worn)
    return derived


def op_in(
    graph: fx.Graph, named: Mapping[str, fx.Node], name: str, kind: type, module: nn.Module, region: str
) -> ops.Operation | Boundary:
    """Returns the operation, or the boundary, that is called `name` in a region's graph.

    Raises:
        AdaptError: If there is none any more.
    """
    if issubclass(kind, Boundary):
        return _boundary(graph, name, kind)
    return _op_at(named.get(name), kind, module, region)


def _boundary(graph: fx.Graph, name: str, kind: type) -> Boundary:
    try:
        return leaf_of(graph, name) if kind is Leaf else boundary_of(graph, name)
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
    adapter = adapters.by_name[name]
    if adapter.overwritten:
        _unmerge_first(modules, adapters)  # or their originals would bring back what was replaced
    del adapters.by_name[name]
    forget_mixing(adapters)
    for path, attribute in adapter.tensor_names(name):
        adapters.owned.discard(path, attribute)
    # tolerant of what is no longer there: somebody may have put another module in the place of an adapted one
    present = {path: modules[path] for path, _ in adapter.tensor_names(name) if path in modules}
    for path, attribute in adapter.tensor_names(name):
        if path in present and hasattr(present[path], attribute):
            delattr(present[path], attribute)
    for adapted in adapter.sites:
        for constant in adapted.constants:
            if adapted.site.owner in present:
                present[adapted.site.owner].__dict__.pop(adapted.names[constant], None)
    for (path, attribute), tensor in adapter.overwritten.items():
        held = modules[path]._parameters.get(attribute) if path in modules else None
        if held is not None:
            held.data.copy_(tensor)


def merge(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Adds the changes of adapters to the weights, and writes their stand-ins over the tensors themselves.

    Raises:
        AdaptError: If a weight is tied to another one, which would change too, or two adapters have stand-ins for the
            same tensor; nothing is merged.
    """
    merged = list(dict.fromkeys(names))
    _refuse_merging(modules, adapters, merged)
    _restore(modules, adapters.originals)
    adapters.merged, adapters.originals = [], {}
    with torch.no_grad():
        # these first, since they are what the changes are changes of
        for name in merged:
            for path, own_names in adapters.by_name[name].stand_ins.items():
                for own, other in stand_ins.own_and_stand_in(modules[path], own_names, name):
                    own.copy_(other)
            for path, rows in adapters.by_name[name].rows.items():
                table, values = _weight(modules, path, "weight"), _weight(modules, path, stand_ins.rows(name))
                table.copy_(stand_ins.put_rows(table, rows.indices, values))
        for sites in _by_weight(adapters, merged).values():
            _merge_into_weight(sites, modules)
    for adapter in adapters.by_name.values():
        adapter.overwritten.clear()  # what was merged into is kept


def merge_in_place(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Adds the changes of adapters to the weights until `unmerge`; nodes of theirs leave the graphs.

    Stand-ins and rows are read as before: what is trained as it is needs no merging.

    Raises:
        AdaptError: As `merge` does, or if a change would go unread; nothing is merged.
    """
    given = list(names)
    # in the order in which they act
    names = [name for name in adapters.active if name in given]
    names += [name for name in given if name not in names]
    _refuse_merging(modules, adapters, names)
    _refuse_unread(modules, adapters, names)
    before = list(adapters.merged)
    kept: Tensors = {}
    try:
        for name in names:
            for place in _changed_places(modules, adapters.by_name[name]):
                if place not in adapters.originals:
                    # a difference wouldn't do: adding and subtracting it doesn't give the same bits
                    kept[place] = adapters.originals[place] = _weight(modules, *place).detach().clone()
            _add_to_weights(modules, adapters.by_name[name], adapters.originals)
            adapters.merged.append(name)
        _let_act(modules, adapters, list(adapters.read))
    except BaseException:
        _restore(modules, adapters.originals)
        adapters.merged = before
        adapters.originals = {place: tensor for place, tensor in adapters.originals.items() if place not in kept}
        with torch.no_grad():
            for name in before:
                _add_to_weights(modules, adapters.by_name[name], adapters.originals)
        raise


def unmerge(modules: Modules, adapters: Adapters) -> None:
    """Gives all weights the values that they had before `merge_in_place`, bit for bit."""
    if not adapters.merged:
        return
    _restore(modules, adapters.originals)
    adapters.merged, adapters.originals = [], {}
    _let_act(modules, adapters, list(adapters.read))


@torch.no_grad()
def _restore(modules: Modules, originals: Tensors) -> None:
    for (path, name), original in originals.items():
        if path in modules:
            _weight(modules, path, name).copy_(original)


@torch.no_grad()
def _add_to_weights(modules: Modules, adapter: Adapter, originals: Tensors) -> None:
    for adapted in adapter.weight_sites:
        base = originals[adapted.site.owner, adapted.site.attribute]
        _add_change(adapted, modules, _weight(modules, adapted.site.owner, adapted.site.attribute), base)


def _add_change(adapted: AdaptedSite, modules: Modules, weight: torch.Tensor, base: torch.Tensor) -> None:
    """Adds the change of a weight, and of the bias beside it."""
    change = delta(adapted, modules, weight, base)
    # where the weight itself changes, as the graph adds it; else the sum alone is rounded
    weight += change.to(weight.dtype) if adapted.site.op is ops.Weight else change
    change = bias_delta(adapted, modules)
    if change is not None:
        bias = _weight(modules, *_bias_place(adapted))
        bias += change.to(bias.dtype)


def _changed_places(modules: Modules, adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Yields the path of the module, and the name, of each weight and bias that merging changes."""
    for adapted in adapter.weight_sites:
        yield adapted.site.owner, adapted.site.attribute
        if bias_delta(adapted, modules) is not None:
            yield _bias_place(adapted)


def _bias_place(adapted: AdaptedSite) -> tuple[str, str]:
    assert isinstance(adapted.site, Site)
    assert adapted.site.bias is not None
    path, _, name = adapted.site.bias.rpartition(".")
    return path, name


@contextlib.contextmanager
def _with_originals(modules: Modules, adapters: Adapters) -> Iterator[None]:
    """Lets weights be as they were before they were merged into, for what looks at their values."""
    changed = {place: _weight(modules, *place).detach().clone() for place in adapters.originals if place[0] in modules}
    _restore(modules, adapters.originals)
    try:
        yield
    finally:
        _restore(modules, changed)


def _weight(modules: Modules, path: str, name: str) -> torch.Tensor:
    weight = modules[path]._parameters[name]
    assert weight is not None
    return weight


def _refuse_unread(modules: Modules, adapters: Adapters, names: list[str]) -> None:
    """Raises AdaptError if what is merged in place would have no effect: something else is read in its place."""
    for name in names:
        adapter = adapters.by_name[name]
        if adapter.replaced:
            raise AdaptError(
                f"{name!r} has taken a part of {listed(list(adapter.replaced))}, so it can't be merged in place; leave "
                "it active, or call merge_and_unload()"
            )
        if (adapter.whole or adapter.rows) and name not in adapters.active:
            raise AdaptError(
                f"{name!r} trains {listed([path or 'the model' for path in (*adapter.whole, *adapter.rows)])} whole or "
                "by rows, which are read while it is active alone; activate it with set_adapter before you merge it"
            )
        for owner, attribute in _changed_places(modules, adapter):
            for other in (adapters.by_name[active] for active in adapters.active):
                if attribute in other.stand_ins.get(owner, ()) or (owner in other.rows and attribute == "weight"):
                    raise AdaptError(
                        f"an active adapter has another tensor, or other rows, in the place of "
                        f"{join(owner, attribute)}, so {name!r} can't be merged into that in place; activate {name!r} "
                        "alone first"
                    )
    _refuse_of_base(adapters, names)


def _refuse_of_base(adapters: Adapters, names: list[str]) -> None:
    """Raises AdaptError if adapters would be merged beside active ones, and a change depends on the other's."""
    merged = [*adapters.merged, *names]
    left = [name for name in adapters.active if name not in merged]
    shared = {adapted.site.weight for name in merged for adapted in _sites(adapters, name)}
    shared &= {adapted.site.weight for name in left for adapted in _sites(adapters, name)}
    for name in (*merged, *left):
        for adapted in _sites(adapters, name):
            if adapted.site.weight in shared and "base" in inspect.signature(adapted.rule.delta).parameters:
                raise AdaptError(
                    f"the change of {adapted.site.weight} by {name!r} depends on the weight itself, so of the adapters "
                    "that act on it, none can be merged alone; merge all that are active, or activate others"
                )


def _sites(adapters: Adapters, name: str) -> list[Any]:
    return adapters.by_name[name].weight_sites


def _refuse_merging(modules: Modules, adapters: Adapters, names: list[str]) -> None:
    for name in names:
        _refuse_unmergeable(adapters.by_name[name], name)
    _stand_in_readers(adapters, names)
    for name in names:
        refuse_missing(modules, adapters.by_name[name], name)
        _refuse_tied(modules, adapters.by_name[name])


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
        _add_change(adapted, modules, weight, base)


@torch.no_grad()
def refuse_infinite(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Raises AdaptError if a weight's change isn't finite."""
    for name in names:
        for adapted in adapters.by_name[name].weight_sites:
            changes = {adapted.site.weight: delta(adapted, modules), adapted.site.bias: bias_delta(adapted, modules)}
            for path, change in changes.items():
                if change is not None and not torch.isfinite(change).all():
                    raise AdaptError(f"the change of {path} by adapter {name!r} isn't finite")
        for path in adapters.by_name[name].rows:
            if not torch.isfinite(getattr(modules[path], stand_ins.rows(name))).all():
                raise AdaptError(f"the rows of {join(path, 'weight')} of adapter {name!r} aren't finite")


def _refuse_unmergeable(adapter: Adapter, name: str) -> None:
    for adapted in adapter.sites:
        reason = unmergeable(adapted)
        if reason is not None:
            raise AdaptError(
                f"{adapted.site.label} of adapter {name!r} can't be merged: {reason}; keep it, or take it off with "
                "unload()"
            )


def refuse_untrainable(adapter: Adapter, name: str) -> None:
    """Raises AdaptError if an adapter that was loaded for inference asks for what can't be done in training."""
    config = copy.copy(adapter.config)
    config.inference_mode = False
    for adapted in adapter.sites:
        reason = adapted.rule.check(adapted.site, config)
        if reason is not None:
            raise AdaptError(
                f"adapter {name!r} was loaded for inference and can't be trained: {adapted.site.label}: {reason} in "
                "the config that you load it with, or call set_adapter with inference_mode=True"
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
    changed = list(_changed_places(modules, adapter))
    changed += [(path, name) for path, names in adapter.stand_ins.items() for name in names]
    changed += [(path, "weight") for path in adapter.rows]
    for path, name in changed:
        # what follows the same rows changes with them
        same = {join(path, name)}
        if path in adapter.rows and name == "weight":
            same |= {join(o, name) for o, rows in adapter.rows.items() if rows.leader == adapter.rows[path].leader}
        tied = [other for other in holders.get(id(modules[path]._parameters.get(name)), ()) if other not in same]
        if tied:
            raise AdaptError(
                f"{join(path, name)} is tied to {', '.join(tied)}, which merging would change too; give one of them a "
                "parameter of its own before adapting"
            )


def unmergeable(adapted: AdaptedSite) -> str | None:
    """Returns the reason why what an adapter does at a site is no change of a weight, or None."""
    return adapted.site.unmergeable or adapted.rule.unmergeable(adapted.site)


def delta(
    adapted: AdaptedSite, modules: Modules, weight: torch.Tensor | None = None, base: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the change of a site's weight, in the shape in which it is stored.

    From half precision on a CPU it is computed in single precision, as PEFT does: faster and rounded once.

    Args:
        adapted: The site with its rule.
        modules: The model's modules by path.
        weight: The weight with the changes of adapters before this one; what the module reads if None.
        base: The weight without them; likewise.
    """
    own = _read_weight(adapted, modules) if base is None else base
    given = {"weight": own if weight is None else weight, "base": own}
    values = _values(adapted.rule.delta, adapted, modules)
    halves = {value.dtype for value in values.values() if _is_half_on_cpu(value)}
    values = {local: value.float() if _is_half_on_cpu(value) else value for local, value in values.items()}
    change = _asked(adapted.rule.delta, values | given)
    return change.to(halves.pop()) if halves else change


def _is_half_on_cpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dtype in HALVES


def bias_delta(adapted: AdaptedSite, modules: Modules) -> torch.Tensor | None:
    """Returns the change of the bias that a site's operations add, or None if it doesn't change."""
    function = getattr(adapted.rule, "bias_delta", None)
    return _asked(function, _values(function, adapted, modules)) if function is not None else None


def _values(function: Any, adapted: AdaptedSite, modules: Modules) -> dict[str, Any]:
    """Returns the parameters and constants at a site for which a rule's function asks by the names of its arguments."""
    owner = modules[adapted.site.owner]
    asked = inspect.signature(function).parameters
    return {local: getattr(owner, name) for local, name in adapted.names.items() if local in asked}


def _asked(function: Any, values: Mapping[str, Any]) -> Any:
    """Calls a rule's function with what it asks for by the names of its arguments; None for what there isn't."""
    return function(**{name: values.get(name) for name in inspect.signature(function).parameters})


def _read_weight(adapted: AdaptedSite, modules: Modules) -> torch.Tensor:
    """Returns the weight that the site's module reads while the adapter acts."""
    assert isinstance(adapted.site, Site)
    attribute = adapted.site.attribute
    return _own(modules[adapted.site.owner], adapted.replaced.get(attribute, attribute))


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


def set_trainable(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Makes the tensors of adapters require grad if they are active, and else not.

    Args:
        modules: The model's modules by path.
        adapters: The model's adapters.
        names: Those that have come, or have begun or ceased to be active; going through all would take the longer the
            more there are.
    """
    for name in dict.fromkeys(names):
        adapter = adapters.by_name[name]
        trains = name in adapters.active and not adapter.config.inference_mode
        frozen = adapter.frozen_names(name)
        for path, attribute in adapter.tensor_names(name):
            # somebody may have put another module in the place of an adapted one
            parameter = modules[path]._parameters.get(attribute) if path in modules else None
            wanted = trains and (path, attribute) not in frozen
            if parameter is not None and parameter.requires_grad != (wanted and parameter.is_floating_point()):
                parameter.requires_grad_(wanted)
