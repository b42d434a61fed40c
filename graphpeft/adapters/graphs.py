"""Which graph each region is to have, so that exactly some adapters act: adds and removes their nodes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

from torch import fx, nn

from graphpeft import ops, rewrite
from graphpeft.adapters.state import Adapter, Adapters, Modules
from graphpeft.ops.boundaries import Boundary, Leaf, boundary_of, leaf_of
from graphpeft.paths import join, within
from graphpeft.plan import AdaptError
from graphpeft.rewrite import AdaptedSite
from graphpeft.tracing.errors import TraceError
from graphpeft.tracing.graph_module import Graphs, Template, template_of


def templates_with(adapters: Adapters, wanted: list[str], modules: Modules) -> dict[str, Template | None]:
    """Returns the template that each region is to wear, or None where it is to run its own code."""
    # nodes come in the order of activation, since a change may be of what adapters before it have made
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(adapters.acting, wanted, strict=False))
    kept = [name for name, _ in pairs]
    leaving = [name for name in adapters.acting if name not in kept]
    coming = wanted[len(kept) :]
    regions = {name: by_region(adapters.by_name[name].sites, modules) for name in {*leaving, *wanted}}
    templates: dict[str, Template | None] = {}
    for name in leaving:
        for region in regions[name]:
            worn = templates.get(region) or worn_in(adapters, region, modules)
            templates[region] = without(worn, name)
    for name in coming:
        for region, sites in regions[name].items():
            worn = templates.get(region) or worn_in(adapters, region, modules)
            templates[region] = with_adapter(worn, modules[region], name, adapters.by_name[name], region, sites)
    needed = {region for name in wanted for region in regions[name]}
    # a graph that its owner has edited is not thrown away for being without adapters
    return {
        region: None
        if region in adapters.lifted and region not in needed and template and template.shared
        else template
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
                    try:
                        rewrite.insert(graph, op, rule, dict(attributes), name, adapter.config.method)
                    except rewrite.NoChangeError as error:
                        raise AdaptError(f"{name!r} can't act on {region or 'the model'}: {error}") from error

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
