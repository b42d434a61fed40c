"""Which graph each region is to have, so that exactly some adapters act: adds and removes their nodes.

Other active adapters mean other graphs, most of them from the cache of a template's edits: the same rule at the same
node in the same slot. So all that differs from site to site, such as a scale, is an attribute that the graph reads.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Hashable, Iterable, Mapping

from torch import fx, nn
from torch.fx.proxy import TraceError as ProxyError

from graphpeft.adapters.exchanged import elsewhere, refuse_exchanged
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapters, Modules
from graphpeft.graph import in_place, ops, slots
from graphpeft.graph.errors import TraceError
from graphpeft.graph.ops.boundaries import Boundary, Leaf, boundary_of, leaf_of
from graphpeft.graph.paths import join, within
from graphpeft.graph.template import Graphs, Template, names_in_slots, template_of
from graphpeft.rules import rewrite
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.code_in_graphs import RuleError
from graphpeft.sites.site import CallSite
from graphpeft.wording import joined


def slots_for(adapters: Adapters, wanted: list[str], modules: Modules) -> dict[str, int]:
    """Returns the slot of each adapter whose nodes are to be in the graphs, in their order.

    The first ones that stay where they are keep theirs; the others get the first that are free.
    """
    seats = {name: adapters.slots[name] for name in _kept(adapters, wanted)}
    coming = wanted[len(seats) :]
    taken = {*seats.values(), *(_slots_of_others(adapters, coming, modules) if coming else ())}
    free = (slot for slot in itertools.count() if slot not in taken)
    return seats | dict(zip(coming, free, strict=False))


def _kept(adapters: Adapters, wanted: Iterable[str]) -> list[str]:
    """Returns the adapters whose nodes stay where they are: the first ones."""
    # nodes come in the order of activation, since a change may be of what adapters before it have made
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(adapters.slots, wanted, strict=False))
    return [name for name, _ in pairs]


def _slots_of_others(adapters: Adapters, names: list[str], modules: Modules) -> set[int]:
    """Returns the slots that adapters have there of a model inside of this one, or around it."""
    own = adapters.slots_by_module()
    changed = {path for name in names for path in adapters.by_name[name].modules_changed} & modules.keys()
    # modules of a class have the same adapters in slots
    kinds = {(type(modules[path]), frozenset(own.get(path, ()))): modules[path] for path in changed}
    found: set[int] = set()
    for (_, owned), module in kinds.items():
        template = template_of(module)
        found |= {*slots.read_in(module), *(template.slots if template is not None else ())} - owned
    return found


def names_of_others(module: nn.Module, own: Collection[int]) -> dict[int, str]:
    """Returns the names of another model's adapters in a module's graph, by slot."""
    return {slot: name for slot, name in names_in_slots(module).items() if slot not in own}


def templates_with(adapters: Adapters, seats: Mapping[str, int], modules: Modules) -> dict[str, Template | None]:
    """Returns the template that each region is to wear, or None where it is to run its own code."""
    kept = _kept(adapters, seats)
    leaving = [name for name in adapters.slots if name not in kept]
    coming = [name for name in seats if name not in kept]
    regions = {name: by_region(adapters.by_name[name].sites, modules) for name in {*leaving, *coming}}
    for name in leaving:
        moved = elsewhere(modules, adapters.by_name[name], name)
        if moved:
            raise AdaptError(
                f"adapter {name!r} acts on {joined(moved)}, which had another place in the model when it was adapted; "
                "put that back before you change what acts, and move it afterwards"
            )
    for name in coming:
        refuse_exchanged(modules, adapters.by_name[name].tensor_names(name), name)
    templates: dict[str, Template | None] = {}
    # the last one first, so that each step back is one that was taken
    for name in reversed(leaving):
        for region in regions[name]:
            worn = templates.get(region) or worn_in(adapters, region, modules)
            templates[region] = without(worn, adapters.slots[name])
    for name in coming:
        method = adapters.by_name[name].config.method
        for region, sites in regions[name].items():
            worn = templates.get(region) or worn_in(adapters, region, modules)
            try:
                templates[region] = with_adapter(worn, modules[region], seats[name], method, region, sites)
            except rewrite.NoChangeError as error:
                before = next((other for other, slot in seats.items() if slot == error.slot), "another model's")
                raise AdaptError(
                    f"{name!r} can't act on {region or 'the model'}: it reads {error.weight} with the changes so "
                    f"far, and what {before!r} does there is none; let {before!r} act behind"
                ) from error
            except rewrite.ChangedInputError as error:
                before = next((other for other, slot in seats.items() if slot == error.slot), "another model's")
                raise AdaptError(
                    f"{name!r} can't act behind {before!r}, which changes {error.argument}, by which it knows where a "
                    f"sequence begins; name {before!r} last, or activate one of them alone"
                ) from error
    # a graph that its owner has edited is not thrown away for being without adapters
    return {
        region: None if template and not template.slots and template.shared and region in adapters.lifted else template
        for region, template in templates.items()
    }


def by_region(sites: list[AdaptedSite], modules: Modules) -> dict[str, list[AdaptedSite]]:
    """Groups sites by their region; a region that somebody has taken out of the model is left out."""
    regions: dict[str, list[AdaptedSite]] = {}
    for adapted in sites:
        if adapted.site.region in modules:
            regions.setdefault(adapted.site.region, []).append(adapted)
    return regions


def worn_in(adapters: Adapters, region: str, modules: Modules) -> Template:
    """Returns the graph that a region has, or would have if an adapter acted there."""
    worn = template_of(modules[region])
    if worn is not None:
        return worn
    lifted = adapters.lifted[region]
    if in_place.original_class(modules[region]) is not lifted.cls:
        raise AdaptError(
            f"{region or 'the model'} is another module than the {lifted.cls.__name__} that was adapted; put that "
            "back, or delete the adapters that it had"
        )
    return lifted.template


def bare(adapters: Adapters, region: str, modules: Modules) -> Template:
    """Returns the graph of a region without any of these adapters."""
    template = worn_in(adapters, region, modules)
    for name, slot in reversed(adapters.slots.items()):
        if any(adapted.site.region == region for adapted in adapters.by_name[name].sites):
            template = without(template, slot)
    return template


def without_any(worn: Template) -> Template:
    """Returns `worn` without the nodes of any adapter, those of another model around or inside among them."""
    for slot in sorted(worn.slots, reverse=True):
        worn = without(worn, slot)
    return worn


def without(worn: Template, slot: int) -> Template:
    """Returns `worn` without the nodes of the adapter in a slot."""
    return worn if slot not in worn.slots else worn.derive(("without", slot), functools.partial(_remove, slot=slot))


def with_adapter(
    worn: Template, module: nn.Module, slot: int, method: str, region: str, sites: list[AdaptedSite]
) -> Template:
    """Returns `worn` with the nodes of one adapter at its sites in this region."""

    def edit(graphs: Graphs) -> None:
        for index, graph in enumerate(graphs):
            named = {node.name: node for node in graph.nodes}
            for adapted in sites:
                rule, attributes = adapted.rule, attributes_at(adapted, region, slot)
                for node in adapted.site.nodes[index]:
                    # read anew each time: an edit before this one may have given the operation another input
                    op = op_in(graph, named, node, adapted.site.op, module, region)
                    try:
                        rewrite.insert(
                            graph, op, rule, attributes, slot, method, adapted.is_change, _is_of_one_call(adapted)
                        )
                    except (RuleError, ProxyError) as error:
                        raise AdaptError(f"{type(rule).__name__} of {method} can't adapt {region}: {error}") from error

    edits = tuple([_edit(adapted, region) for adapted in sites])
    return worn.derive(("with", slot, method, edits), edit, back=("without", slot))


def _edit(adapted: AdaptedSite, region: str) -> tuple[Hashable, ...]:
    """Returns the key of the nodes that an adapter inserts at a site."""
    site, owner = adapted.site, adapted.site.owner
    place = "" if owner == region else within(owner, region)
    return site.op, site.nodes, adapted.rule, place, adapted.in_holder, site.reads, adapted.is_change


def _is_of_one_call(adapted: AdaptedSite) -> bool:
    return not isinstance(adapted.site, CallSite) and adapted.site.call is not None


def op_in(
    graph: fx.Graph, named: Mapping[str, fx.Node], name: str, kind: type, module: nn.Module, region: str
) -> ops.Operation | Boundary:
    """Returns the operation, or the boundary, that is called `name` in a region's graph."""
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


def _remove(graphs: Graphs, slot: int) -> None:
    for graph in graphs:
        rewrite.remove(graph, slot)


def attributes_at(adapted: AdaptedSite, region: str, slot: int) -> dict[str, str]:
    """Returns where a region's graph reads what a rule asks for, by the rule's names."""
    owner, in_slot = adapted.site.owner, adapted.in_slot(slot)
    if owner == region:
        return {**in_slot, **dict(adapted.site.reads)}
    relative = within(owner, region)
    names = {local: join(relative, attribute) for local, attribute in in_slot.items()}
    return {"training": join(relative, "training"), **names}
