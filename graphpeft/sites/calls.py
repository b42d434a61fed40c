"""Sites at calls of modules: finds the boundary of a forward in a graph, and tells the calls of a module apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from graphpeft.graph import ops
from graphpeft.graph.autocast import default_precision
from graphpeft.graph.errors import TraceError
from graphpeft.graph.ops.boundaries import NAME, boundaries_inside, boundary_of
from graphpeft.graph.own_forward import call_through
from graphpeft.graph.paths import join, modules_by_path, within
from graphpeft.graph.replaceable import refuse_what_a_graph_cannot_replace
from graphpeft.graph.template import VALUE, Graphs, runs_graph
from graphpeft.graph.traced_model import stands_for
from graphpeft.sites.regions import Regions
from graphpeft.sites.site import CallSite, LeafSite, OneCall, Site


class Crossing(NamedTuple):
    """The place of the boundary of one module's forward.

    Attributes:
        region: The path of the module whose graph has the boundary.
        nodes: The names of the boundaries, for each graph of the region.
        arguments: The names of the forward's arguments.
        values: Example values of the arguments, by name, where the graph has any.
        returned: An example of the returned value, if the graph has one.
    """

    region: str
    nodes: tuple[tuple[str, ...], ...]
    arguments: tuple[str, ...]
    values: Mapping[str, Any]
    returned: Any


def boundary(regions: Regions, path: str) -> Crossing:
    """Returns the place of the boundary of the forward of the module at `path`; the module need not be traced."""
    module = regions.modules[path]
    if not regions.is_called(path):
        return _boundary_inside(regions, path)
    template = regions.templates.get(path) or regions.present(path)
    if template is None:
        refuse_what_a_graph_cannot_replace(module)
        template = regions.recordings.lift(module) if isinstance(module, fx.GraphModule) else call_through(module)
    regions.templates[path] = template
    return _crossing(path, template.graphs, ((NAME,),) * len(template.graphs))


def boundary_site(regions: Regions, path: str) -> CallSite:
    """Returns the site at the boundary of the forward of the module at `path`.

    An adapter's tensors there have the device and dtype of the module's first parameter, or else of the model's.
    """
    crossing = boundary(regions, path)
    found = (_first_parameter(regions, at) for at in (path, ""))
    beside, dtype = next(filter(None, found), ((path, ""), default_precision()))
    return CallSite(
        crossing.region,
        crossing.nodes,
        path,
        "boundary",
        beside,
        dtype,
        crossing.arguments,
        file_path=join("base_model.model", path),
    )


def _first_parameter(regions: Regions, path: str) -> tuple[tuple[str, str], torch.dtype] | None:
    for inside, module in modules_by_path(regions.modules[path]).items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                return (join(path, inside), name), parameter.dtype
    return None


def _boundary_inside(regions: Regions, path: str) -> Crossing:
    """Returns the boundaries of a module's calls that were inlined into a flat graph."""
    graphs = [region for region in regions.graphs if not region or path.startswith(f"{region}.")]
    around = max(graphs, key=len, default=None)
    template = regions.template(around) if around is not None else None
    if around is None or template is None:
        raise TraceError(f"a {type(regions.modules[path]).__name__} is never called")
    names = tuple(boundaries_inside(graph, within(path, around)) for graph in template.graphs)
    if not all(names):
        raise TraceError(f"a {stands_for(regions.modules[path]).__name__} isn't called in the graph")
    return _crossing(around, template.graphs, names)


def calls_of(regions: Regions, site: Site | LeafSite) -> list[Site | LeafSite]:
    """Returns one site for each operation, or call, of `site`; a site with a single one stays unchanged."""
    if site.region and runs_graph(regions.modules[""]):
        raise TraceError(f"{site.region} stays a call in the graph, which has no place for what differs inside")
    if site.region:
        raise TraceError("only a flat graph of the whole model tells the calls of a module apart")
    if site.op is ops.Weight:
        raise TraceError("its weight is used as such, and not in operations that could be told apart")
    counts = {len(nodes) for nodes in site.nodes}
    if len(counts) > 1:
        raise TraceError("in training it is called another number of times than in evaluation")
    (count,) = counts
    if count == 1:
        return [site]
    each = zip(*site.nodes, strict=True)
    return [
        site._replace(nodes=tuple((node,) for node in nodes), call=OneCall(number, count))
        for number, nodes in enumerate(each, start=1)
    ]


def _crossing(region: str, graphs: Graphs, names: tuple[tuple[str, ...], ...]) -> Crossing:
    found = [boundary_of(graph, name) for graph, of_graph in zip(graphs, names, strict=True) for name in of_graph]
    if found[0].arguments and found[0].arguments[0] not in found[0].inputs:
        raise TraceError(f"its first argument, {found[0].arguments[0]}, isn't one value of the graph")
    values = {name: node.meta[VALUE] for name, node in found[0].inputs.items() if VALUE in node.meta}
    return Crossing(region, names, found[0].arguments, values, found[0].output.meta.get(VALUE))
