"""The graph of a region in which each row of a batch has its own adapter: rules' `by_row` on stacked parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphpeft.adapters.graphs import op_in
from graphpeft.adapters.present_rows import RowParameters, present
from graphpeft.adapters.rows import Where, place_of
from graphpeft.graph import ops
from graphpeft.graph.ops.boundaries import Leaf
from graphpeft.graph.paths import join, within
from graphpeft.graph.template import Graphs, Template
from graphpeft.rules import rewrite
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.arguments import asked_by
from graphpeft.rules.delta_rule import ProductRule
from graphpeft.rules.parameter_spec import Dropout
from graphpeft.rules.rule import RunsByRow
from graphpeft.sites.parts import is_view
from graphpeft.wording import joined


def itself(module: nn.Module) -> nn.Module:
    """Returns the module, as the property that `ITSELF` names."""
    return module


ITSELF = "_graphpeft_itself"
"""The attribute by which a graph, which can only read attributes, gets the module that owns it."""


def at_once(
    plain: Template,
    module: nn.Module,
    region: str,
    by_name: Mapping[str, list[AdaptedSite]],
    regions: Mapping[tuple[str, str], set[str]],
) -> Template | str:
    """Returns the graph that runs all rows at once in a region, or the reason why there is none."""
    in_one = _joined_sites(by_name)
    if in_one is None:
        rules = {type(adapted.rule).__name__ for sites in by_name.values() for adapted in sites}
        return f"{joined(sorted(rules))} has no by_row for what the adapters do there"
    if _rearranges(plain, module, region, in_one):
        return "an operation reads another view of a tensor, whose first dimension may not be the batch"
    return _by_row(plain, module, region, in_one, regions)


def _joined_sites(by_name: Mapping[str, list[AdaptedSite]]) -> list[tuple[AdaptedSite, Any]] | None:
    """Returns each site with the rule for all adapters there, or None if there isn't one for each."""
    at_weight: dict[tuple[str, str], list[AdaptedSite]] = {}
    for sites in by_name.values():
        for adapted in sites:
            at_weight.setdefault((adapted.site.owner, adapted.site.prefix), []).append(adapted)
    found = [(sites[0], _joined(sites)) for sites in at_weight.values()]
    return None if any(rule is None for _, rule in found) else found


def _rearranges(plain: Template, module: nn.Module, region: str, sites: list[tuple[AdaptedSite, Any]]) -> bool:
    """Returns whether an operation's input is another view of a tensor, whose first dimension may not be the batch."""
    for index, graph in enumerate(plain.graphs):
        named = {node.name: node for node in graph.nodes}
        for adapted, _ in sites:
            site: Any = adapted.site
            for node in site.nodes[index]:
                op: Any = op_in(graph, named, node, site.op, module, region)
                if is_view(op.x):
                    return True
    return False


def _joined(sites: Sequence[AdaptedSite]) -> Any:
    first = sites[0].rule
    if (
        not isinstance(first, RunsByRow)
        or not first.zeros_change_nothing
        or (isinstance(first, ProductRule) and sites[0].site.op not in (ops.Linear, Leaf))
        or any(place_of(adapted) != place_of(sites[0]) for adapted in sites)
        # which are found by their names in holders at the module itself
        or any(adapted.rule.held_in or any(spec.path for spec in adapted.specs.values()) for adapted in sites)
    ):
        return None
    rule = first.joined([adapted.rule for adapted in sites])
    if rule is None:
        return None
    asked = asked_by(rule.by_row)
    return rule if all(asked.may_be(name) for adapted in sites for name in adapted.specs) else None


def regions_of_weights(by_region: Mapping[str, Mapping[str, list[AdaptedSite]]]) -> dict[tuple[str, str], set[str]]:
    """Returns the regions of each weight: an adapter that came when a module around was a graph has its site there."""
    found: dict[tuple[str, str], set[str]] = {}
    for region, by_name in by_region.items():
        for adapted in itertools.chain(*by_name.values()):
            found.setdefault(place_of(adapted)[1:3], set()).add(region)
    return found


def _by_row(
    plain: Template,
    module: nn.Module,
    region: str,
    sites: list[tuple[AdaptedSite, Any]],
    regions: Mapping[tuple[str, str], set[str]],
) -> Template:
    edits = tuple(
        (
            within(adapted.site.owner, region) or ITSELF,
            adapted.site.prefix,
            adapted.site.op,
            adapted.site.nodes,
            rule,
            tuple(adapted.specs),
            tuple(rule.constants_by_row.items()),
            # only where it is needed, since it tells regions apart that could share a template
            place_of(adapted)[:3] if len(regions[place_of(adapted)[1:3]]) > 1 else None,
        )
        for adapted, rule in sites
    )

    def edit(graphs: Graphs) -> None:
        for index, graph in enumerate(graphs):
            named = {node.name: node for node in graph.nodes}
            for owner, prefix, kind, nodes, rule, parameters, constants, where in edits:
                for node in nodes[index]:
                    op: Any = op_in(graph, named, node, kind, module, region)
                    values = _values_by_row(graph, op, owner, prefix, parameters, constants, where)
                    training = "training" if owner == ITSELF else join(owner, "training")
                    rewrite.replace(graph, op, rule.by_row, values, {"training": training})

    return plain.derive(("by row", edits), edit)


def _values_by_row(
    graph: fx.Graph,
    op: Any,
    owner: str,
    prefix: str,
    parameters: Sequence[str],
    constants: Sequence[tuple[str, float | None]],
    where: Where | None,
) -> dict[str, fx.Node]:
    """Emits the reading of the adapters' parameters and numbers, for the rows of the operation's input."""
    with graph.inserting_before(op.node):
        holder = graph.create_node("get_attr", owner)
        rows = graph.call_function(_rows_of, (op.x, holder))
        values = {name: graph.call_method("stacked", (rows, holder, prefix + name, where)) for name in parameters}
        for name, missing in constants:
            if type(missing) is Dropout:
                values[name] = graph.call_method("dropout", (rows, holder, prefix + name))
            else:
                values[name] = graph.call_method("number", (rows, holder, prefix + name, missing))
        return values


def _rows_of(x: torch.Tensor, module: nn.Module) -> RowParameters:
    return present().of(x, module)
