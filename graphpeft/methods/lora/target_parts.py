"""Which parts of fused projections a config adapts alone: by their names, told by the graph, or by their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphpeft.graph import ops
from graphpeft.graph.errors import TraceError
from graphpeft.rules.report import Refusal, Report
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.parts import parts_of
from graphpeft.sites.site import LeafSite, Runs, Site
from graphpeft.targeting import targets


def with_parts(
    sites: Sequence[Site | LeafSite], wanted: Mapping[str, list[Any]], finder: SiteFinder, report: Report
) -> list[Site | LeafSite]:
    """Returns the sites with the parts of fused projections that a config names.

    Args:
        sites: The sites.
        wanted: Parts by the name of a projection, as in a list of `target_modules`: their names, or pairs of rows.
        finder: Finds parts in the graphs of the model.
        report: Gets what is refused.
    """
    found: list[Site | LeafSite] = []
    used: set[str] = set()
    for site in sites:
        key = _key_for(site.name, wanted)
        if key is None:
            found.append(site)
            continue
        used.add(key)
        if isinstance(site, LeafSite):
            report.refused.append(Refusal(site.name, "it has no weight whose rows could be told apart"))
            continue
        try:
            found.append(site._replace(parts=_parts(site, wanted[key], finder)))
        except TraceError as error:
            way_out = f"name its rows, as in target_parts={{{key!r}: [[0, 64], [128, 192]]}}"
            report.refused.append(
                Refusal(site.name, f"which of its rows are which part can't be told: {error}", way_out)
            )
    for key in wanted.keys() - used:
        near = targets.near_misses([key], [site.name for site in sites])
        hint = f"; near misses: {', '.join(near)}" if near else ""
        report.refused.append(Refusal(key, f"target_parts names no target{hint}", "name a target, or leave it out"))
    return found


def wanted_parts(name: str, wanted: Mapping[str, list[Any]]) -> list[Any] | None:
    """Returns the parts that a config names of the projection of this name, or None if it names none."""
    key = _key_for(name, wanted)
    return None if key is None else wanted[key]


def _key_for(name: str, wanted: Mapping[str, list[Any]]) -> str | None:
    return next((key for key in wanted if name == key or name.endswith(f".{key}")), None)


def _parts(site: Site, wanted: list[Any], finder: SiteFinder) -> tuple[Runs, ...]:
    named = [part for part in wanted if isinstance(part, str)]
    if site.op is ops.Weight and named:
        raise TraceError("its weight is used as such, and not in a linear operation whose result is parted")
    if site.op not in (ops.Linear, ops.Weight):
        raise TraceError(f"its weight is used in a {site.op.__name__.lower()}, not a linear operation")
    known = parts_of(finder.regions, site) if named else {}
    unknown = [name for name in named if name not in known]
    if unknown:
        raise TraceError(f"there is no part {unknown[0]!r}, but {', '.join(known)}")
    return tuple(known[part] if isinstance(part, str) else ((int(part[0]), int(part[1])),) for part in wanted)
