"""A picture in the JSON of Google's Model Explorer: collections of graphs, with nodes, namespaces and attributes.

The viewer shows the largest graph of the first collection, so what is to be seen first has a collection of its own. The
graph of modules has a node for each module that has no others inside or whose forward has a graph; from there a click
leads to that graph. In the graphs, namespaces are the calls of modules, and an adapter's nodes have a colour.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from graphpeft.graph.paths import join
from graphpeft.showing.picture import DrawnGraph, DrawnModule, DrawnNode, DrawnSite, Picture

_COLOURS = ("#fde0b2", "#c7e3c9", "#cfd8f6", "#f6cfe0", "#d9d0ef", "#c6e7ea", "#eee3a8", "#e3cfc1")
"""The backgrounds of nodes of adapters, by the adapter's place."""


def model_explorer(picture: Picture) -> str:
    """Returns a picture as text for Model Explorer."""
    modules = {module.path: module for module in _all(picture.model)}
    overview = [_overview(picture, modules.values())]
    forwards = {
        path: [_graph(picture, modules, module, drawn) for drawn in _graphs(picture, module)]
        for path, module in modules.items()
    }
    first = forwards.pop("") or overview
    rest = [graph for graphs in forwards.values() for graph in graphs]
    collections = [
        {"label": picture.title, "subgraphs": first},
        {"label": "inside", "subgraphs": rest if first is overview else overview + rest},
    ]
    return json.dumps([each for each in collections if each["subgraphs"]], ensure_ascii=False)


def _all(module: DrawnModule) -> Iterator[DrawnModule]:
    yield module
    for inside in module.inside:
        yield from _all(inside)


def _graphs(picture: Picture, module: DrawnModule) -> list[DrawnGraph]:
    return [] if module.graphs is None else picture.graphs[module.graphs]


def _id(module: DrawnModule, drawn: DrawnGraph) -> str:
    return f"{module.path or 'the model'}{f' in {drawn.mode}' if drawn.mode else ''}"


def _overview(picture: Picture, modules: Iterable[DrawnModule]) -> dict[str, Any]:
    nodes = []
    groups = {}
    for module in modules:
        told = _of_module(picture, module)
        if module.inside:
            groups[module.path.replace(".", "/")] = dict(told)
        if not module.inside or module.graphs is not None:
            around = module.path.rpartition(".")[0] if not module.inside else module.path
            nodes.append(
                {
                    "id": module.path or "the model",
                    "label": f"{module.name or picture.title}: {module.cls}",
                    "namespace": around.replace(".", "/"),
                    "subgraphIds": [_id(module, drawn) for drawn in _graphs(picture, module)],
                    "attrs": _attributes(told),
                }
                | _style([site.adapter for site in module.sites])
            )
    return {"id": "modules", "nodes": nodes, "groupNodeAttributes": groups}


def _of_module(picture: Picture, module: DrawnModule) -> list[tuple[str, str]]:
    told = [("class", module.cls), ("parameters", f"{module.parameters:,}")]
    told += [("kept for the backward", f"{module.kept:,} bytes")] if module.kept is not None else []
    told += [("seconds of a forward", f"{module.seconds:.6f}")] if module.seconds is not None else []
    told += [("remark", picture.remark)] if picture.remark and module is picture.model else []
    for each in module.trained:
        told.append((f"{picture.adapters[each.adapter].name} trains", each.tensors))
    return told


def _graph(
    picture: Picture, modules: Mapping[str, DrawnModule], module: DrawnModule, drawn: DrawnGraph
) -> dict[str, Any]:
    known = {node.name for node in drawn.after}
    nodes = []
    for node in drawn.after:
        site = _site(module, node)
        edges = [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
            for place, source in enumerate(node.inputs)
            if source in known
        ]
        value = node.value or module.shapes.get(node.name, "")
        called = modules.get(join(module.path, node.module)) if node.op == "call_module" else None
        nodes.append(
            {
                "id": node.name,
                "label": node.label,
                "namespace": "/".join(call.strip("()") for call in node.calls),
                "subgraphIds": [] if called is None else [_id(called, other) for other in _graphs(picture, called)],
                "attrs": _attributes(_of_node(picture, module, node, site)),
                "incomingEdges": edges,
                "outputsMetadata": [{"id": "0", "attrs": _attributes([("value", value)])}] if value else [],
            }
            | _style([] if node.slot is None else [module.slots[node.slot]])
        )
    return {"id": _id(module, drawn), "nodes": nodes}


def _site(module: DrawnModule, node: DrawnNode) -> DrawnSite | None:
    """Returns the site that a node of an adapter is at."""
    if node.slot is None:
        return None
    here = [site for site in module.sites if site.adapter == module.slots.get(node.slot)]
    return next((site for site in here if node.site in site.nodes), here[0] if here else None)


def _of_node(
    picture: Picture, module: DrawnModule, node: DrawnNode, site: DrawnSite | None
) -> Iterator[tuple[str, str]]:
    yield "op", node.op
    yield "arguments", node.arguments
    yield "path", node.module
    yield "line", node.line
    yield "in the place of", node.over
    yield from (("checked in each run", check) for check in node.checks)
    if node.name in module.kept_by:
        yield "kept for the backward", f"{module.kept_by[node.name]:,} bytes"
    if site is None:
        return
    adapter = picture.adapters[site.adapter]
    yield "adapter", f"{adapter.name}: {adapter.method} ({adapter.options})"
    yield "site", f"{site.label}, {site.op}, {site.size}"
    yield "rule", site.rule
    yield "‖ΔW‖ / ‖W‖", "" if site.change is None else f"{site.change:.4g}"
    yield "merges", f"no: {site.merges}" if site.merges else "yes"
    for tensor in site.tensors:
        gradient = "" if tensor.gradient is None else f", gradient {tensor.gradient:.4g}"
        yield tensor.name, f"{tensor.shape}, {'trained' if tensor.trained else 'frozen'}{gradient}"


def _attributes(told: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in told if value]


def _style(adapters: Sequence[int]) -> dict[str, Any]:
    """Returns the style of a node of these adapters, which is that of the first."""
    return {"style": {"backgroundColor": _COLOURS[adapters[0] % len(_COLOURS)]}} if adapters else {}
