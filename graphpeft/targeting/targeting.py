"""Finds the sites in a model that `target_modules` and `target_parameters` of a config name.

A name that can't be adapted goes into the report with the reason; nothing is skipped silently.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft.graph.computed_weights import read_weight
from graphpeft.graph.paths import join, modules_by_path, paths_inside_wrappers
from graphpeft.graph.traced_model import stands_for
from graphpeft.peft_errors import PeftWarning
from graphpeft.progress import over
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import TargetOptions
from graphpeft.rules.report import Refusal, Report
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.gradient_flow import hands_gradients_on, trains
from graphpeft.sites.layer_kinds import declares_features, kind_of_layer
from graphpeft.sites.leaves import leaf_site
from graphpeft.sites.quantised import described, is_quantised
from graphpeft.sites.site import LeafSite, NoSiteError, Site
from graphpeft.targeting import pattern_values, targets
from graphpeft.targeting.targets import Match
from graphpeft.wording import joined, shown


class _Weights(NamedTuple):
    """The weights that a module's name stands for, by their paths in the module.

    Attributes:
        of_layer: The weights that PEFT adapts as the layer; the adapter of the first has the module's own name.
        of_parameters: The weights, adapted as parameters, if the first of `of_layer` is absent.
        redrawn: The weight whose initial values PEFT draws twice: before all others, and in its turn.
    """

    of_layer: tuple[str, ...]
    of_parameters: tuple[str, ...] = ()
    redrawn: str | None = None


_WEIGHTS: dict[type[nn.Module], _Weights] = {
    nn.MultiheadAttention: _Weights(
        ("in_proj_weight", "out_proj.weight"),
        ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
        redrawn="out_proj.weight",
    )
}
"""The weights of modules whose name doesn't stand for their `weight`."""

_OWN_WEIGHT = _Weights(("weight",))


class _Target(NamedTuple):
    """A weight that a config names.

    Attributes:
        name: The path of the named module or parameter.
        owner: The path of the module that owns the weight.
        attribute: The weight's name in its owner; "" for a module's call.
        is_parameter: Whether the weight is named as a parameter, or can only be adapted as one.
        stands_with: All weights that the name stands for.
    """

    name: str
    owner: str
    attribute: str
    is_parameter: bool = False
    stands_with: _Weights = _OWN_WEIGHT


def targeted_modules(config: PeftConfig, modules: Mapping[str, nn.Module], report: Report) -> list[str]:
    """Returns the paths of the modules that `config` targets, of any class."""
    decide = targets.compile_matcher(config.target_options)
    found = {path: decide(path) for path in modules if path}
    report.excluded += [path for path, answer in found.items() if answer is Match.EXCLUDED]
    named = [path for path, answer in found.items() if answer is Match.YES]
    if not named:
        _report_nothing(modules, config.target_options, report)
    return named


def targeted_sites(config: Any, finder: SiteFinder, report: Report) -> list[Site | LeafSite]:
    """Returns the sites that `config` targets, in PEFT's order of drawing initial values: layers, then parameters."""
    found: list[Site | LeafSite] = []
    by_weight: dict[tuple[str, str], _Target] = {}
    refused: list[tuple[Refusal, torch.Tensor | None]] = []
    decide = targets.compile_matcher(config.target_options)
    report.refused += [Refusal(path, why) for path, why in finder.regions.scripted.items() if decide(path) is Match.YES]
    named = [*_targeted(finder.modules, config.target_options, decide, report)]
    for target in over(named, "finding operations", "weights"):
        weight = (target.owner, target.attribute)
        try:
            site = _site_of(target, finder, config)
        except NoSiteError as reason:
            tensor = finder.modules[target.owner]._parameters.get(target.attribute)
            refused.append((Refusal(target.name, str(reason)), tensor))
            continue
        if weight not in by_weight:
            by_weight[weight] = target
            found.append(site)
        elif target.is_parameter != by_weight[weight].is_parameter:
            reason = "both target_modules and target_parameters name its weight"
            way_out = "name a weight in target_modules or target_parameters alone"
            report.refused.append(Refusal(target.name, reason, way_out))
    adapted = {
        id(finder.modules[site.owner]._parameters.get(site.attribute)) for site in found if isinstance(site, Site)
    }
    # a graph, such as an exported program's, may read a tied tensor by only one of its names
    report.refused += [refusal for refusal, tensor in refused if tensor is None or id(tensor) not in adapted]
    if not found and not report.refused:
        _report_nothing(finder.modules, config.target_options, report)
    return _as_peft_sorts(found, finder.modules)


def _site_of(target: _Target, finder: SiteFinder, config: Any) -> Site | LeafSite:
    """Returns the site of a named weight, or of a named module's calls."""
    if not target.attribute:
        return _leaf(finder, target.name, config)
    site = finder.find(target.owner, target.attribute)
    if not trains(finder.regions, site):
        if not target.is_parameter and config.adapts_leaves:
            return _leaf(finder, target.name, config)
        raise NoSiteError(f"the function that its forward calls has no gradient for its {target.attribute}")
    if target.is_parameter:
        return site._replace(is_layer=False)
    if target.stands_with is _OWN_WEIGHT:
        return site
    site = site._replace(is_layer=True, named=target.name)
    redrawn = target.stands_with.redrawn
    if redrawn is None or target.owner != target.name:
        return site
    try:
        again = finder.find(*_split(join(target.name, redrawn)))
    except NoSiteError:
        return site  # the redrawn weight is refused in its own turn
    return site._replace(redrawn=(again._replace(named=target.name),))


def _split(path: str) -> tuple[str, str]:
    owner, _, name = path.rpartition(".")
    return owner, name


def _targeted(
    modules: Mapping[str, nn.Module],
    options: TargetOptions,
    decide: Callable[[str], Match],
    report: Report,
) -> Iterator[_Target]:
    """Yields the weights and calls that the config names; `decide` tells whether a path is a target."""
    for path, module in modules.items():
        found = decide(path) if path and not _is_of_parametrization(path) else Match.NO
        if found is Match.EXCLUDED:
            report.excluded.append(path)
        elif found is Match.YES:
            yield from _weights_of(path, module, modules)
        for name, tensor in module._parameters.items():
            # the name of a module stands for its weight; that of the model is none
            stands_for_weight = name == "weight" and path != ""
            if tensor is None or (stands_for_weight and not options.target_parameters):
                continue
            weight = join(path, name)
            if options.target_parameters and targets.match_parameter(options, weight):
                yield _Target(weight, path, name, is_parameter=True)
            elif not stands_for_weight and tensor.ndim > 1 and decide(weight) is Match.YES:
                yield _Target(weight, path, name, is_parameter=name == "weight")


def _weights_of(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> list[_Target]:
    """Returns the weights that a module's name stands for."""
    cls = stands_for(module)
    if issubclass(cls, nn.RNNBase | nn.RNNCellBase):
        names = [name for name, tensor in module._parameters.items() if tensor is not None and tensor.ndim > 1]
        return [_Target(join(path, name), path, name) for name in names]
    weights = _weights_for(cls)
    weight = module._parameters.get(weights.of_layer[0])
    if weight is None and kind_of_layer(cls) is not None:
        weight = read_weight(module, "weight")
    is_layer = weight is not None and not is_quantised(weight)
    if weights is _OWN_WEIGHT:
        return [_Target(path, path, "weight" if is_layer else "")]
    names = weights.of_layer if is_layer else weights.of_parameters
    places = (_split(join(path, name)) for name in names)
    return [
        _Target(path, owner, attribute, not is_layer, weights)
        for owner, attribute in places
        if owner in modules and modules[owner]._parameters.get(attribute) is not None
    ]


def _is_of_parametrization(path: str) -> bool:
    """Returns whether a module inside of a layer computes the layer's tensors, and is no layer itself."""
    return ".parametrizations." in f".{path}."


@functools.lru_cache(maxsize=256)
def _weights_for(cls: type) -> _Weights:
    return next((found for of, found in _WEIGHTS.items() if issubclass(cls, of)), _OWN_WEIGHT)


def _as_peft_sorts(sites: list[Site | LeafSite], modules: Mapping[str, nn.Module]) -> list[Site | LeafSite]:
    if all(site.is_layer for site in sites):
        return sites  # already in the modules' order
    order = {path: index for index, path in enumerate(modules)}

    def place(site: Site | LeafSite) -> tuple[bool, int, int]:
        own = [*modules[site.owner]._parameters]
        number = own.index(site.attribute) if site.attribute in own else 0
        return not site.is_layer, order[site.owner], number

    return sorted(sites, key=place)


def _leaf(finder: SiteFinder, name: str, config: Any) -> LeafSite:
    """Returns the site of the calls of a module that has no weight to change."""
    module = finder.modules[name]
    parts = modules_by_path(module).items()
    inside = [path for path, part in parts if path and part._parameters.get("weight") is not None]
    if config.adapts_leaves and (declares_features(module) or not (inside or _is_of_pytorch(module))):
        site = leaf_site(finder.regions, name)
        if not config.inference_mode and not hands_gradients_on(finder.regions, site):
            warnings.warn(
                f"no gradient goes through a {stands_for(module).__name__}, such as {name}, to what is in front of it: "
                "adapters there learn only by other ways",
                PeftWarning,
                stacklevel=2,
            )
        return site
    weight = module._parameters.get("weight")
    if weight is not None:
        lacking = "it is no layer with in_features and out_features"
        if not config.adapts_leaves:
            lacking = f"{config.method} adapts weights that are plain numbers"
        raise NoSiteError(f"its weight is quantised ({described(weight)}), and {lacking}")
    advice = f"; name modules inside it, such as {name}.{inside[0]}" if inside else ""
    raise NoSiteError(f"a {stands_for(module).__name__} has no parameter called weight{advice}")


def _is_of_pytorch(module: nn.Module) -> bool:
    """Returns whether a module is PyTorch's own layer; without a weight, an activation or the like."""
    return stands_for(module).__module__.startswith("torch.nn.")


def _report_nothing(modules: Mapping[str, nn.Module], options: TargetOptions, report: Report) -> None:
    """Reports that a config's targets match nothing in a model."""
    option = "target_modules" if options.target_modules else "target_parameters"
    report.nothing_matched = f"{option}: {_nothing_matched(modules, options, report)}"
    report.refused.append(Refusal(option, report.nothing_matched))


def _nothing_matched(modules: Mapping[str, nn.Module], options: TargetOptions, report: Report) -> str:
    model = modules[""]
    wanted = options.target_modules or options.target_parameters or ()
    names = [path for path in modules if path]
    names += _targets_by_path(modules)
    near = [name for name in targets.near_misses(wanted, names) if name not in wanted]
    kept_out = f"; exclude_modules or modules_to_save excluded {joined(report.excluded)}"
    because = kept_out if report.excluded else ""
    if options.layers_to_transform is not None:
        because += f"; layers_to_transform is {options.layers_to_transform!r}"
    if options.layers_pattern is not None:
        because += f"; layers_pattern is {options.layers_pattern!r}"
    hint = f"; near misses: {', '.join(near)}" if near else f"; the model has {joined(names, most=10)}"
    if not report.excluded:
        hint = _spelling(wanted, names) or hint
    named = shown(wanted) if isinstance(wanted, str) else f"[{joined([shown(name) for name in sorted(wanted)])}]"
    return f"nothing in {type(model).__name__} matches {named}{because}{hint}"


def _spelling(wanted: Any, names: list[str]) -> str | None:
    """Returns a hint if the targets would match in another spelling, else None."""
    if not names:
        return "; a layer by itself has no name: adapt the model that it is part of, or nn.Sequential(layer)"
    ends = tuple(_original(entry) for entry in ([wanted] if isinstance(wanted, str) else wanted))
    originals = [name for name in names if name.endswith(ends)]
    if originals:
        return f"; a parametrization computes it, from {joined(originals)}: name that, or the layer in target_modules"
    if isinstance(wanted, str):
        if targets.unmatched([wanted], names):
            return None
        return f"; a text is a regular expression for a whole name: write [{wanted!r}] for all names that end so"
    return "; 'all-linear' is written without a list" if any(map(targets.is_all_linear, wanted)) else None


def _original(name: str) -> str:
    """Returns the name of the tensor from which `torch.nn.utils.parametrize` would compute another."""
    path, _, attribute = name.rpartition(".")
    return join(path, f"parametrizations.{attribute}.original")


def unmatched_entries(config: PeftConfig, modules: Mapping[str, nn.Module], report: Report) -> list[str]:
    """Returns the entries of `config` that match nothing, with near misses: one text for each option.

    An entry of a list matches if a name ends in it, whether or not that name becomes a target; a pattern for ranks or α
    matches if it fits a target.
    """
    wanted = [*(adapted.site.name for adapted in report.adapted), *(refusal.name for refusal in report.refused)]
    wanted += [adapted.site.label for adapted in report.adapted if getattr(adapted.site, "call", None) is not None]
    options, found = config.target_options, []
    # iterators, since the first few names usually show that all entries match
    for option, entries, names in (
        ("target_modules", options.target_modules, lambda: _names(modules)),
        ("exclude_modules", options.exclude_modules, lambda: _names(modules)),
        ("target_parameters", options.target_parameters, lambda: _names_of_parameters(modules)),
        *((option, patterns, lambda: wanted) for option, patterns in options.patterns.items()),
    ):
        # a single regular expression has no entries to check
        if not entries or isinstance(entries, str):
            continue
        left = targets.unmatched(entries, names())
        if isinstance(entries, Mapping):
            left = [key for key in left if not pattern_values.fits_any(key, wanted)]
        if left:
            near = targets.near_misses(left[:5], targets.endings(names(), left[:5]))
            hint = f" (near misses: {', '.join(near)})" if near else ""
            found.append(f"{joined([repr(entry) for entry in left])} in {option}{hint}")
    return found


def _names_of_parameters(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    return itertools.chain(_parameters(modules), map(targets.own_parameter_entry, modules[""]._parameters))


def _names(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Returns all names that a list of modules can have, the rare ones last."""
    return itertools.chain(modules, _targets_by_path(modules), _inside_wrappers(modules))


def _inside_wrappers(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    yield from paths_inside_wrappers(modules[""])


def kept_out_entries(
    config: PeftConfig, resolved: PeftConfig, modules: Mapping[str, nn.Module], report: Report
) -> list[str]:
    """Returns the entries of `target_modules` with no adapter since `modules_to_save` trains all that they name."""
    entries = config.target_options.target_modules
    if not entries or isinstance(entries, str):
        return []
    wanted = [*(adapted.site.name for adapted in report.adapted), *(refusal.name for refusal in report.refused)]
    left = targets.unmatched(entries, wanted)
    if not left or not resolved.modules_to_save:
        return []
    trained = targets.compile_matcher(TargetOptions(modules_to_save=resolved.modules_to_save))
    # what exclude_modules names, too, has no adapter on purpose
    left_out = targets.compile_matcher(TargetOptions(exclude_modules=resolved.target_options.exclude_modules))
    names = [path for path in (*modules, *_targets_by_path(modules)) if path and trained(path) is Match.EXCLUDED]
    unknown = targets.unmatched(left, (path for path in names if left_out(path) is not Match.EXCLUDED))
    return [entry for entry in left if entry not in unknown]


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    return (join(path, name) for path, module in modules.items() for name in module._parameters)


def _targets_by_path(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yields the paths of parameters that `target_modules` can name; a module's weight is named by the module."""
    return (
        join(path, name)
        for path, module in modules.items()
        for name, tensor in module._parameters.items()
        if tensor is not None and tensor.ndim > 1 and (name != "weight" or not path)
    )
