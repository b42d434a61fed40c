"""Works out what a config does to a model, and changes nothing: which sites, which rules, which graphs.

config ─▶ names ─▶ sites ─▶ rules ─▶ Plan (with a Report of what is refused, and why)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn

from graphpeft import stand_ins, targets
from graphpeft.config import TASK_HEADS, PeftConfig
from graphpeft.report import Refusal, Report, listed
from graphpeft.rewrite import AdaptedSite
from graphpeft.sites import Site, SiteFinder
from graphpeft.targets import Match
from graphpeft.tracing.graph_module import Template
from graphpeft.tracing.trace import ExampleInputs


class AdaptError(ValueError):
    """A config that can't be applied to the model, which stays as it was."""


@dataclass
class Plan:
    """What adapting a model comes to.

    Attributes:
        modules: The model's modules by path.
        config: The config, with all that depends on the model filled in.
        report: The same for a person to read, with what is refused.
        sites: The sites to adapt.
        templates: The graphs of their regions as they are now.
        whole: The tensors that are trained whole: names by the path of their module.
        nothing_matched: Why the config names nothing in the model, if so.
    """

    modules: Mapping[str, nn.Module]
    config: PeftConfig
    report: Report
    sites: list[AdaptedSite] = field(default_factory=list)
    templates: dict[str, Template] = field(default_factory=dict)
    whole: dict[str, tuple[str, ...]] = field(default_factory=dict)
    nothing_matched: str = ""


def join(path: str, name: str) -> str:
    """Returns the path of an attribute of the module at `path`."""
    return f"{path}.{name}" if path else name


def make_plan(
    model: nn.Module,
    config: PeftConfig,
    adapter: str,
    *,
    owned: frozenset[str] = frozenset(),
    known: Mapping[str, Template] = MappingProxyType({}),
    example_inputs: ExampleInputs | None = None,
    autocast_adapter_dtype: bool = True,
) -> Plan:
    """Returns what `config` does to `model`, which stays as it is.

    Args:
        model: The model.
        config: The config.
        adapter: The adapter's name.
        owned: The paths of parameters that belong to adapters, which no adapter targets.
        known: Graphs of regions that were recorded before, by path.
        example_inputs: Inputs of the model, for modules whose forward decides on theirs.
        autocast_adapter_dtype: Whether an adapter on half precision weights has single precision.

    Raises:
        AdaptError: If the config asks for something that isn't supported.
    """
    try:
        config.check()
        resolved = config.resolved(model)
        targets.compile_matcher(resolved)
    except ValueError as error:
        raise AdaptError(str(error)) from error
    finder = SiteFinder(model, known, example_inputs)
    plan = Plan(finder.modules, resolved, Report(config.peft_type.value, adapter))
    plan.report.adapted = plan.sites
    for name, owner, attribute, is_parameter in _targeted(finder.modules, resolved, owned, plan.report):
        found = finder.find(owner, attribute) if attribute else _no_weight(finder.modules[name], name)
        if isinstance(found, str):
            plan.report.refused.append(Refusal(name, found))
            continue
        site = found._replace(is_layer=False) if is_parameter else found
        if any((site.owner, site.attribute) == (other.site.owner, other.site.attribute) for other in plan.sites[-1:]):
            reason = "both target_modules and target_parameters name its weight"
            plan.report.refused.append(
                Refusal(name, reason, "name a weight in target_modules or target_parameters alone")
            )
            continue
        _add_site(plan, site, finder.templates[site.region], autocast_adapter_dtype)
    _sort_as_peft_does(plan.sites, finder.modules)
    if not plan.sites and not plan.report.refused:
        plan.nothing_matched = _nothing_matched(model, resolved, plan.report, owned)
        option = "target_modules" if getattr(resolved, "target_modules", None) else "target_parameters"
        plan.report.refused.append(Refusal(option, plan.nothing_matched))
    _add_whole(plan, finder.modules, owned)
    return plan


def _targeted(
    modules: Mapping[str, nn.Module], config: PeftConfig, owned: frozenset[str], report: Report
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
        for name, tensor in module._parameters.items():
            weight = join(path, name)
            if tensor is None or weight in owned:
                continue
            if names_parameters and targets.match_parameter(config, weight):
                yield weight, path, name, True
            elif name != "weight" and tensor.ndim > 1 and decide(weight) is Match.YES:
                yield weight, path, name, False


def _sort_as_peft_does(sites: list[AdaptedSite], modules: Mapping[str, nn.Module]) -> None:
    """Sorts sites as PEFT draws their first values: layers, then parameters, each in the model's order."""
    if all(adapted.site.is_layer for adapted in sites):
        return  # they were found in that order
    order = {path: index for index, path in enumerate(modules)}

    def place(adapted: AdaptedSite) -> tuple[bool, int, int]:
        site = adapted.site
        return not site.is_layer, order[site.owner], list(modules[site.owner]._parameters).index(site.attribute)

    sites.sort(key=place)


def _no_weight(module: nn.Module, name: str) -> str:
    inside = [path for path, child in module.named_modules() if path and child._parameters.get("weight") is not None]
    advice = f"; name modules inside it, such as {name}.{inside[0]}" if inside and _calls(module) else ""
    return f"a {type(module).__name__} has no parameter called weight{advice}"


def _calls(module: nn.Module) -> bool:
    return not isinstance(module, nn.MultiheadAttention)


def _add_site(plan: Plan, site: Site, template: Template, autocast: bool) -> None:
    config = plan.config
    dtype = torch.float32 if autocast and site.dtype in _HALVES else site.dtype
    rule = config.rule_for(site, dtype)
    reason = rule.check(site, config)
    if reason is not None:
        plan.report.refused.append(Refusal(site.name, reason))
        return
    specs, constants = rule.parameters(site, config), rule.constants(site, config)
    prefix = "" if site.attribute == "weight" else f"{site.attribute}_"
    names = _names((*specs, *constants), prefix, plan.report.adapter)
    plan.sites.append(AdaptedSite(site, rule, specs, constants, names, dtype))
    plan.templates[site.region] = template


# equal sites share one
@functools.lru_cache(maxsize=1024)
def _names(of_rule: tuple[str, ...], prefix: str, adapter: str) -> Mapping[str, str]:
    return {name: f"{prefix}{name}_{adapter}" for name in of_rule}


_HALVES = (torch.float16, torch.bfloat16)

_WHOLE_WAY_OUT = "name other modules in modules_to_save, or none"


def _add_whole(plan: Plan, modules: Mapping[str, nn.Module], owned: frozenset[str]) -> None:
    """Adds the modules and biases that are trained whole."""
    saved = _saved_modules(modules, plan.config)
    for name in plan.config.modules_to_save or ():
        # the heads that a task brings along are named for every model, whichever it has
        if name not in TASK_HEADS and not any(path.endswith(name) for path in saved):
            near = targets.near_misses([name], modules)
            hint = f"; near misses: {', '.join(near)}" if near else ""
            plan.report.refused.append(Refusal(name, f"modules_to_save names no module{hint}", _WHOLE_WAY_OUT))
    for path in saved:
        for inner, module in modules[path].named_modules(prefix=path):
            own = tuple(name for name in stand_ins.tensors_of(module) if join(inner, name) not in owned)
            reason = stand_ins.refusal(module)
            if reason is not None:
                plan.report.refused.append(Refusal(inner, reason, _WHOLE_WAY_OUT))
            elif own:
                plan.whole[inner] = own
    for path, names in _biases(modules, plan, owned).items():
        plan.whole.setdefault(path, names)
    plan.report.trained_whole = [join(path, name) for path, names in plan.whole.items() for name in names]


def _saved_modules(modules: Mapping[str, nn.Module], config: PeftConfig) -> list[str]:
    """Returns the paths of `modules_to_save`, as PEFT's `_set_trainable` finds them: by the end of the path."""
    ends = tuple(config.modules_to_save or ())
    found: list[str] = []
    for path in modules if ends else ():
        if path and path.endswith(ends) and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found


def _biases(modules: Mapping[str, nn.Module], plan: Plan, owned: frozenset[str]) -> dict[str, tuple[str, ...]]:
    """Returns the biases to train, as PEFT's `_mark_only_adapters_as_trainable` finds them: by their name."""
    bias = getattr(plan.config, "bias", "none")
    if bias == "none":
        return {}
    if bias == "all":
        found = {
            path: tuple(
                name
                for name, tensor in module._parameters.items()
                if tensor is not None and name == "bias" and join(path, name) not in owned
            )
            for path, module in modules.items()
        }
        return {path: names for path, names in found.items() if names}
    layers = dict.fromkeys(adapted.site.owner for adapted in plan.sites if adapted.site.is_layer)
    return {path: ("bias",) for path in layers if modules[path]._parameters.get("bias") is not None}


def _nothing_matched(model: nn.Module, config: PeftConfig, report: Report, owned: frozenset[str]) -> str:
    wanted = getattr(config, "target_modules", None) or getattr(config, "target_parameters", None) or ()
    names = [path for path, _ in model.named_modules() if path]
    names += [path for path, tensor in model.named_parameters() if tensor.ndim > 1 and path not in owned]
    near = targets.near_misses(wanted, names)
    because = f"; excluded were {listed(report.excluded)}" if report.excluded else ""
    for option in ("layers_to_transform", "layers_pattern"):
        if getattr(config, option, None) is not None:
            because += f"; {option} is {getattr(config, option)!r}"
    hint = f"; near misses: {', '.join(near)}" if near else f"; the model has {listed(names, most=10)}"
    shown = repr(wanted) if isinstance(wanted, str) else f"[{listed([repr(name) for name in sorted(wanted)])}]"
    return f"nothing in {type(model).__name__} matches {shown}{because}{hint}"


def unmatched_entries(config: PeftConfig, plan: Plan) -> list[str]:
    """Returns what `config` names in vain, with near misses, one text for each option.

    An entry of a list is right if a name ends in it, whether or not that becomes a target; a pattern for ranks or α is
    right if it fits a target.

    Args:
        config: The config as it was given, without what was filled in for the model.
        plan: What it came to.
    """
    modules = plan.modules
    wanted = [*(adapted.site.name for adapted in plan.sites), *(refusal.name for refusal in plan.report.refused)]
    found: list[str] = []
    # the names are read again where they are needed: mostly the first few tell that all entries are right
    for option, names in (
        ("target_modules", lambda: itertools.chain(modules, _parameters(modules))),
        ("exclude_modules", lambda: itertools.chain(modules, _parameters(modules))),
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
