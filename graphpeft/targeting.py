"""From what a config names to sites: the weights that `target_modules` and `target_parameters` mean in a model.

What is named and can't be adapted goes into the report, with the reason; nothing is skipped in silence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphpeft import ops, targets
from graphpeft.parts import Runs
from graphpeft.paths import join
from graphpeft.report import Refusal, Report, listed
from graphpeft.sites import LeafSite, Site, SiteFinder, declares_features
from graphpeft.targets import Match
from graphpeft.tracing.errors import TraceError
from graphpeft.tracing.trace import stands_for


def targeted_sites(config: Any, finder: SiteFinder, report: Report, owned: frozenset[str]) -> list[Site | LeafSite]:
    """Returns the sites that `config` targets, in the order in which PEFT draws first values: layers, then parameters.

    Args:
        config: A config with PEFT's fields for targets, resolved for the model.
        finder: Finds sites in the model.
        report: Gets what is excluded or refused, or that nothing matched.
        owned: The paths of parameters that belong to adapters, which no adapter targets.
    """
    found: list[Site | LeafSite] = []
    weights: set[tuple[str, str]] = set()
    refused: list[tuple[Refusal, torch.Tensor | None]] = []
    for name, owner, attribute, is_parameter in _targeted(finder.modules, config, owned, report):
        site = finder.find(owner, attribute) if attribute else _leaf(finder, name, config)
        if isinstance(site, str):
            tensor = finder.modules[owner]._parameters.get(attribute)
            refused.append((Refusal(name, site), tensor))
        elif (owner, attribute) in weights:
            reason = "both target_modules and target_parameters name its weight"
            way_out = "name a weight in target_modules or target_parameters alone"
            report.refused.append(Refusal(name, reason, way_out))
        else:
            weights.add((owner, attribute))
            found.append(site._replace(is_layer=False) if is_parameter and isinstance(site, Site) else site)
    adapted = {id(finder.modules[site.owner]._parameters[site.attribute]) for site in found if isinstance(site, Site)}
    # a graph may read a tensor by one of its names alone, as that of an exported program does
    report.refused += [refusal for refusal, tensor in refused if tensor is None or id(tensor) not in adapted]
    if not found and not report.refused:
        report.nothing_matched = _nothing_matched(finder.modules, config, report, owned)
        option = "target_modules" if config.target_modules else "target_parameters"
        report.refused.append(Refusal(option, report.nothing_matched))
    return _as_peft_sorts(found, finder.modules)


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
        key = next((key for key in wanted if site.name == key or site.name.endswith(f".{key}")), None)
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


def _parts(site: Site, wanted: list[Any], finder: SiteFinder) -> tuple[Runs, ...]:
    if site.op is not ops.Linear:
        raise TraceError(f"its weight is used in a {site.op.__name__.lower()}, not a linear operation")
    named = [part for part in wanted if isinstance(part, str)]
    known = finder.parts_of(site) if named else {}
    unknown = [name for name in named if name not in known]
    if unknown:
        raise TraceError(f"there is no part {unknown[0]!r}, but {', '.join(known)}")
    return tuple(known[part] if isinstance(part, str) else ((int(part[0]), int(part[1])),) for part in wanted)


def _targeted(
    modules: Mapping[str, nn.Module], config: object, owned: frozenset[str], report: Report
) -> Iterator[tuple[str, str, str, bool]]:
    """Yields each target's name, the weight's owner and name in it ("" if there is none), and if it is a parameter."""
    decide = targets.compile_matcher(config)
    names_parameters = bool(getattr(config, "target_parameters", None))
    for path, module in modules.items():
        found = decide(path) if path else Match.NO
        if found is Match.EXCLUDED:
            report.excluded.append(path)
        elif found is Match.YES:
            yield path, path, "weight" if _is_floating(module._parameters.get("weight")) else "", False
        for name, tensor in module._parameters.items():
            weight = join(path, name)
            if tensor is None or weight in owned:
                continue
            if names_parameters and targets.match_parameter(config, weight):
                yield weight, path, name, True
            elif name != "weight" and tensor.ndim > 1 and decide(weight) is Match.YES:
                yield weight, path, name, False


def _is_floating(weight: torch.Tensor | None) -> bool:
    # a quantised layer may hold its weight in integers, to which no change can be added
    return weight is not None and weight.is_floating_point()


def _as_peft_sorts(sites: list[Site | LeafSite], modules: Mapping[str, nn.Module]) -> list[Site | LeafSite]:
    if all(site.is_layer for site in sites):
        return sites  # they were found in that order
    order = {path: index for index, path in enumerate(modules)}

    def place(site: Site | LeafSite) -> tuple[bool, int, int]:
        number = list(modules[site.owner]._parameters).index(site.attribute) if isinstance(site, Site) else 0
        return not site.is_layer, order[site.owner], number

    return sorted(sites, key=place)


def _leaf(finder: SiteFinder, name: str, config: Any) -> LeafSite | str:
    """Returns the site of the calls of a module without a weight, or the reason why it has none."""
    module = finder.modules[name]
    inside = [path for path, child in module.named_modules() if path and child._parameters.get("weight") is not None]
    if config.adapts_leaves and (declares_features(module) or not (inside or _is_of_pytorch(module))):
        return finder.leaf(name)
    advice = f"; name modules inside it, such as {name}.{inside[0]}" if inside and _calls(module) else ""
    return f"a {type(module).__name__} has no parameter called weight{advice}"


def _is_of_pytorch(module: nn.Module) -> bool:
    """Tells whether a module is a layer of PyTorch's own: an operation if it has a weight, else an activation."""
    return stands_for(module).__module__.startswith("torch.nn.")


def _calls(module: nn.Module) -> bool:
    return not isinstance(module, nn.MultiheadAttention)


def _nothing_matched(modules: Mapping[str, nn.Module], config: Any, report: Report, owned: frozenset[str]) -> str:
    model = modules[""]
    wanted = config.target_modules or getattr(config, "target_parameters", None) or ()
    names = [path for path in modules if path]
    names += [path for path in _targets_by_path(modules) if path not in owned]
    near = targets.near_misses(wanted, names)
    because = f"; excluded were {listed(report.excluded)}" if report.excluded else ""
    for option in ("layers_to_transform", "layers_pattern"):
        if getattr(config, option, None) is not None:
            because += f"; {option} is {getattr(config, option)!r}"
    hint = f"; near misses: {', '.join(near)}" if near else f"; the model has {listed(names, most=10)}"
    shown = repr(wanted) if isinstance(wanted, str) else f"[{listed([repr(name) for name in sorted(wanted)])}]"
    return f"nothing in {type(model).__name__} matches {shown}{because}{hint}"


def unmatched_entries(config: object, modules: Mapping[str, nn.Module], report: Report) -> list[str]:
    """Returns what `config` names in vain, with near misses, one text for each option.

    An entry of a list is right if a name ends in it, whether or not that becomes a target; a pattern for ranks or α is
    right if it fits a target.

    Args:
        config: The config as it was given, without what was filled in for the model.
        modules: The model's modules by path.
        report: What it came to.
    """
    wanted = [*(adapted.site.name for adapted in report.adapted), *(refusal.name for refusal in report.refused)]
    found: list[str] = []
    # the names are read again where they are needed: mostly the first few tell that all entries are right
    for option, names in (
        ("target_modules", lambda: itertools.chain(modules, _targets_by_path(modules))),
        ("exclude_modules", lambda: itertools.chain(modules, _targets_by_path(modules))),
        ("target_parameters", lambda: _parameters(modules)),
        ("rank_pattern", lambda: wanted),
        ("alpha_pattern", lambda: wanted),
    ):
        entries = getattr(config, option, None)
        # one regular expression either matches or doesn't
        if not entries or isinstance(entries, str):
            continue
        left = targets.unmatched(entries, names())
        if isinstance(entries, Mapping):
            left = [key for key in left if not targets.fits_any(key, wanted)]
        if left:
            near = targets.near_misses(left[:5], targets.endings(names(), left[:5]))
            hint = f" (near misses: {', '.join(near)})" if near else ""
            found.append(f"{listed([repr(entry) for entry in left])} in {option}{hint}")
    return found


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    return (join(path, name) for path, module in modules.items() for name in module._parameters)


def _targets_by_path(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yields the paths of parameters that `target_modules` can name; a weight is named by its module."""
    return (
        join(path, name)
        for path, module in modules.items()
        for name, tensor in module._parameters.items()
        if tensor is not None and tensor.ndim > 1 and name != "weight"
    )
