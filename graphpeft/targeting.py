"""From what a config names to sites: the weights that `target_modules` and `target_parameters` mean in a model.

What is named and can't be adapted goes into the report, with the reason; nothing is skipped in silence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from graphpeft import targets
from graphpeft.paths import TensorPaths, join
from graphpeft.report import Refusal, Report, listed
from graphpeft.sites import Site, SiteFinder
from graphpeft.targets import Match


def targeted_sites(config: Any, finder: SiteFinder, report: Report, owned: TensorPaths) -> list[Site]:
    """Returns the sites that `config` targets, in the order in which PEFT draws first values: layers, then parameters.

    Args:
        config: A config with PEFT's fields for targets, resolved for the model.
        finder: Finds sites in the model.
        report: Gets what is excluded or refused, or that nothing matched.
        owned: The paths of parameters that belong to adapters, which no adapter targets.
    """
    found: list[Site] = []
    weights: set[tuple[str, str]] = set()
    for name, owner, attribute, is_parameter in _targeted(finder.modules, config, owned, report):
        site = finder.find(owner, attribute) if attribute else _no_weight(finder.modules[name], name)
        if isinstance(site, str):
            report.refused.append(Refusal(name, site))
        elif (owner, attribute) in weights:
            reason = "both target_modules and target_parameters name its weight"
            way_out = "name a weight in target_modules or target_parameters alone"
            report.refused.append(Refusal(name, reason, way_out))
        else:
            weights.add((owner, attribute))
            found.append(site._replace(is_layer=False) if is_parameter else site)
    if not found and not report.refused:
        report.nothing_matched = _nothing_matched(finder.modules, config, report, owned)
        option = "target_modules" if config.target_modules else "target_parameters"
        report.refused.append(Refusal(option, report.nothing_matched))
    return _as_peft_sorts(found, finder.modules)


def _targeted(
    modules: Mapping[str, nn.Module], config: object, owned: TensorPaths, report: Report
) -> Iterator[tuple[str, str, str, bool]]:
    """Yields each target's name, the weight's owner and name in it ("" if there is none), and if it is a parameter."""
    decide = targets.compile_matcher(config)
    names_parameters = bool(getattr(config, "target_parameters", None))
    for path, module in modules.items():
        found = decide(path) if path else Match.NO
        if found is Match.EXCLUDED:
            report.excluded.append(path)
        elif found is Match.YES:
            yield path, path, "weight" if module._parameters.get("weight") is not None else "", False
        for name in _own_names(module, owned.names(path)):
            tensor, weight = module._parameters[name], join(path, name)
            if tensor is None:
                continue
            if names_parameters and targets.match_parameter(config, weight):
                yield weight, path, name, True
            elif name != "weight" and tensor.ndim > 1 and decide(weight) is Match.YES:
                yield weight, path, name, False


def _own_names(module: nn.Module, of_adapters: set[str]) -> list[str]:
    """Returns the names of the parameters that aren't those of adapters, in the module's order.

    A hundred adapters have many more of them, which mostly come behind; so it stops where only those can be left.
    """
    own: list[str] = []
    for name in module._parameters:
        if name not in of_adapters:
            own.append(name)
        elif len(own) + len(of_adapters) == len(module._parameters):
            break
    return own


def _as_peft_sorts(sites: list[Site], modules: Mapping[str, nn.Module]) -> list[Site]:
    if all(site.is_layer for site in sites):
        return sites  # they were found in that order
    order = {path: index for index, path in enumerate(modules)}

    def place(site: Site) -> tuple[bool, int, int]:
        return not site.is_layer, order[site.owner], list(modules[site.owner]._parameters).index(site.attribute)

    return sorted(sites, key=place)


def _no_weight(module: nn.Module, name: str) -> str:
    inside = [path for path, child in module.named_modules() if path and child._parameters.get("weight") is not None]
    advice = f"; name modules inside it, such as {name}.{inside[0]}" if inside and _calls(module) else ""
    return f"a {type(module).__name__} has no parameter called weight{advice}"


def _calls(module: nn.Module) -> bool:
    return not isinstance(module, nn.MultiheadAttention)


def _nothing_matched(modules: Mapping[str, nn.Module], config: Any, report: Report, owned: TensorPaths) -> str:
    model = modules[""]
    wanted = config.target_modules or config.target_parameters or ()
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
