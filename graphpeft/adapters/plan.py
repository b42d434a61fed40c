"""Works out what a config does to a model, and changes nothing: which sites, which rules, which graphs.

config ─▶ names ─▶ sites ─▶ rules ─▶ Plan (with a Report of what is refused, and why)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft.graph import ops, overrides
from graphpeft.graph.autocast import HALVES, in_own_precision
from graphpeft.graph.holders import name_at
from graphpeft.graph.hosts.accelerate import is_loaded_with_others, is_offloaded
from graphpeft.graph.hosts.sharding import is_partitioned
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.paths import join
from graphpeft.graph.template import Template
from graphpeft.peft_errors import PeftError
from graphpeft.rules.adapted_site import AdaptedSite, names_in_holder
from graphpeft.rules.arguments import unknown_argument
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.mistakes import contradiction, lacking_base, unfit_bases
from graphpeft.rules.options import Role
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.plain_values import ATOMS, fields_of
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.rule import Mergeable, changes_bias
from graphpeft.rules.weight_reader import WeightReader
from graphpeft.sites.asked_once import Answers, without_paths
from graphpeft.sites.finder import NOTHING_KNOWN, Known, SiteFinder
from graphpeft.sites.site import CallSite, LeafSite, Site
from graphpeft.targeting import embedding_layers, targets
from graphpeft.targeting.full_training import TrainedRows, full_training, trained_rows
from graphpeft.targeting.patterns import PatternError
from graphpeft.wording import joined, number_of


class AdaptError(PeftError, ValueError):
    """A config that can't be applied to the model, which stays as it was.

    Examples:
        >>> try:
        ...     get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["1"]))
        ... except AdaptError as error:
        ...     print(error)
        target_modules: nothing in Sequential matches ['1']; the model has 0
    """


class NoMatchingPeftModuleError(AdaptError):
    """A config that names nothing of the model, which stays as it was.

    Examples:
        >>> try:
        ...     get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["1"]))
        ... except NoMatchingPeftModuleError as error:
        ...     print(error)
        target_modules: nothing in Sequential matches ['1']; the model has 0
    """


class Scoped(NamedTuple):
    """A parameter that several sites share.

    Attributes:
        label: The site that has come first.
        place: The path of its module, and the parameter's name there.
        spec: The spec that its rule gives for it.
        dtype: The dtype of that site's parameters.
    """

    label: str
    place: tuple[str, str]
    spec: ParameterSpec
    dtype: torch.dtype


@dataclass
class Plan:
    """The result of planning how a model is adapted.

    Attributes:
        modules: The model's modules by path.
        config: The config, with all that depends on the model filled in.
        report: The same for a person to read, with what is refused.
        sites: The sites to adapt.
        templates: The graphs of their regions as they are now.
        fully_trained: The tensors that are fully trained: names by the path of their module.
        infixes: The parts of names in files behind the paths of such modules.
        saved: The paths of the modules of `modules_to_save`, and of the modules inside of these.
        rows: The rows of weights that are trained, by the path of their module.
        autocast: Whether an adapter on half precision weights has single precision.
        scopes: The parameters that several sites share, by their scopes.
        found: The sites of weights as they were found, by the path of the weight's module and the weight's name there.
        renewed: The paths of regions that are other modules than when they were adapted before.
        answers: The rules and tensors of sites, once for all that are alike.
    """

    modules: Mapping[str, nn.Module]
    config: PeftConfig
    report: Report
    sites: list[AdaptedSite] = field(default_factory=list)
    templates: dict[str, Template] = field(default_factory=dict)
    fully_trained: dict[str, tuple[str, ...]] = field(default_factory=dict)
    infixes: dict[str, str] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    rows: dict[str, TrainedRows] = field(default_factory=dict)
    autocast: bool = True
    scopes: dict[str, Scoped] = field(default_factory=dict)
    found: Mapping[tuple[str, str], Site] = field(default_factory=dict)
    renewed: Set[str] = frozenset()
    answers: Answers = field(default_factory=Answers)


def make_plan(
    model: nn.Module,
    config: PeftConfig,
    adapter: str,
    *,
    known: Known = NOTHING_KNOWN,
    example_inputs: ExampleInputs | None = None,
    autocast_adapter_dtype: bool = True,
    where: Callable[[Any], bool] | None = None,
) -> Plan:
    """Returns what `config` does to `model`, which stays as it is."""
    finder = SiteFinder(model, known, example_inputs)
    if "" in finder.regions.scripted:
        raise AdaptError(finder.regions.scripted[""])
    _refuse_partitioned(finder.modules)
    try:
        config.check()
        _refuse_too_many_names(config, finder.modules)
        resolved: Any = config.resolved(model)
        resolved.is_resolved = True
        targets.compile_matcher(resolved.target_options)
    except ValueError as error:
        raise AdaptError(str(error)) from error
    if resolved.keeps_tied:
        _refuse_hidden_ties(finder.modules, f"{resolved.option_for(Role.TYING)}=True")
    report = Report(config.method, adapter)
    plan = Plan(finder.regions.all_modules, resolved, report, autocast=autocast_adapter_dtype)
    plan.found, plan.renewed = finder.found, finder.regions.renewed
    try:
        _fill(plan, finder, where)
    except PatternError as error:
        raise AdaptError(str(error)) from error
    if plan.rows and not embedding_layers.are_untied(model):
        _refuse_hidden_ties({path: finder.modules[path] for path in plan.rows}, "rows that are trained")
    return plan


def _refuse_hidden_ties(modules: Mapping[str, nn.Module], what: str) -> None:
    """Raises AdaptError if modules are offloaded, whose tensors don't show then which of them are one."""
    if any(map(is_offloaded, modules.values())):
        raise AdaptError(
            f"{what}: which weights are tied can't be told while they are offloaded; adapt the model first, and "
            "offload it then"
        )


def _fill(plan: Plan, finder: SiteFinder, where: Callable[[Any], bool] | None) -> None:
    """Puts into a plan what its config comes to."""
    resolved = plan.config
    plan.report.adapted = plan.sites
    sites = resolved.find_sites(finder, plan.report)
    if where is not None:
        sites = _narrow(plan, sites, where)
    try:
        plan.config = plan.config.prepared(sites)
        if type(resolved).measured is not PeftConfig.measured:
            with in_own_precision(finder.modules):
                plan.config = plan.config.measured(sites, WeightReader(finder.modules))
    except ValueError as error:
        raise AdaptError(str(error)) from error
    for site in sites:
        _add_site(plan, site, finder.templates[site.region])
    weights = [site for site in sites if not isinstance(site, CallSite)]
    training = full_training(plan.config, finder.modules, weights, plan.report)
    plan.fully_trained, plan.infixes, plan.saved = training
    _refuse_replaced_twice(plan)
    plan.report.fully_trained = [join(path, name) for path, names in plan.fully_trained.items() for name in names]
    plan.rows = trained_rows(plan.config, finder.modules, weights, plan.fully_trained, plan.report)
    plan.report.fully_trained += [
        f"{number_of(len(rows.indices), 'row')} of {join(path, 'weight')}" for path, rows in plan.rows.items()
    ]
    _refuse_loaded_together(plan)


def _refuse_partitioned(modules: Mapping[str, nn.Module]) -> None:
    """Raises AdaptError if DeepSpeed's ZeRO-3 has the values of a model's parameters, with which nothing was tried."""
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if is_partitioned(parameter):
                raise AdaptError(
                    f"DeepSpeed's ZeRO-3 has partitioned {join(path, name)}, and adapters on such models are untried; "
                    "adapt the model before deepspeed.initialize, outside of deepspeed.zero.Init, or shard it by "
                    "PyTorch's fully_shard"
                )


def _refuse_loaded_together(plan: Plan) -> None:
    """Raises AdaptError if accelerate offloads a module that gets tensors as one with others around it."""
    if "accelerate.hooks" not in sys.modules:
        return
    together = [path for path, module in plan.modules.items() if is_loaded_with_others(module)]
    owners = [*(adapted.site.owner for adapted in plan.sites), *plan.fully_trained, *plan.rows]
    for outer in together:
        inside = next((path for path in owners if not outer or f"{path}.".startswith(f"{outer}.")), None)
        if inside is not None:
            raise AdaptError(
                f"accelerate offloads {outer or 'the model'} with all that is in it, as preload_module_classes says, "
                f"and would look for the tensors of an adapter at {inside} there; offload the model without this "
                "option, or adapt it first and take the adapter in with merge_and_unload()"
            )


def _refuse_too_many_names(config: PeftConfig, modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError if an option has more names than a model of this size can give a meaning."""
    for option in fields_of(type(config)):
        entries = getattr(config, option.name)
        if entries is None or type(entries) in ATOMS or not isinstance(entries, Collection):
            continue
        if isinstance(entries, str) or len(entries) <= _NAMES_BESIDE:
            continue
        most = _NAMES_BESIDE + 4 * sum(1 + len(module._parameters) for module in modules.values())
        if len(entries) > most and isinstance(next(iter(entries)), str):
            raise ValueError(f"{option.name} has {len(entries)} names; for a model of this size, {most} at most")


_NAMES_BESIDE = 1000
"""How many names a config may have beside those of the model, since it may be written for several."""


def _narrow(plan: Plan, sites: Sequence[Any], where: Callable[[Any], bool]) -> list[Any]:
    """Returns the sites that are meant, and lets the plan's config name these alone, as its file must."""
    if not sites:
        if not plan.report.nothing_matched and not plan.report.refused:
            raise AdaptError(
                f"where chooses among sites, and {plan.config.method} has none here, since it trains the model's own "
                "tensors; name them by the config's options"
            )
        return []
    kept = [site for site in sites if where(site)]
    if not kept:
        plan.report.nothing_matched = f"where holds for none of {joined([site.name for site in sites])}"
        plan.report.refused.append(Refusal("where", plan.report.nothing_matched, "let where hold for some sites"))
    elif len(kept) < len(sites):
        _refuse_untied(kept, sites)
        parameters = (join(path, name) for path, module in plan.modules.items() for name in module._parameters)
        names = [*filter(None, plan.modules), *parameters]
        try:
            plan.config = plan.config.naming(kept, names)
        except ValueError as error:
            raise AdaptError(str(error)) from error
    return kept


def _refuse_untied(kept: Sequence[Any], sites: Sequence[Any]) -> None:
    """Raises AdaptError if one of two tied sites is kept without the other."""
    owners = {site.owner for site in kept}
    for site in sites:
        if isinstance(site, Site) and site.tied_to is not None and (site.owner in owners) != (site.tied_to in owners):
            raise AdaptError(f"where holds for one alone of {site.tied_to} and {site.owner}, which are tied")


def _add_site(plan: Plan, site: Site | LeafSite | CallSite, template: Template) -> None:
    dtype = dtype_of_adapter(site.dtype, plan.autocast)
    kind = without_paths(site)
    rule = plan.answers.of(site, kind, "rule", functools.partial(_rule_at, plan.config, dtype))
    adapted = plan.answers.of(site, kind, rule, functools.partial(_adapted, plan, rule, dtype))
    if isinstance(adapted, str):
        plan.report.refused.append(Refusal(site.label, adapted, site.way_out))
        return
    changed = (site.attribute,) if isinstance(site, Site) else ()
    if isinstance(site, Site) and site.bias is not None and changes_bias(rule):
        changed = (site.attribute, site.bias.rpartition(".")[2])
    shared = _shared(plan, site, adapted.specs, adapted.names, dtype)
    plan.sites.append(adapted._replace(site=site, rule=rule, changed=changed, shared=shared))
    plan.templates[site.region] = template


def _rule_at(config: Any, dtype: torch.dtype, site: Any) -> Any:
    rule = config.rule_for(site, dtype)
    _refuse_no_rule(rule)
    return rule.at_site(site, dtype)


def _adapted(plan: Plan, rule: Any, dtype: torch.dtype, site: Any) -> AdaptedSite | str:
    """Returns a site with its rule, its parameters and their names; or the reason why the rule can't adapt it."""
    config, is_weight = plan.config, isinstance(site, Site)
    reason = rule.check(site, config)
    # the method's own reason tells a user more
    unfit = unfit_bases(type(rule), Site if is_weight else type(site), site.op) if reason is None else None
    if unfit is not None:
        raise AdaptError(unfit)
    if reason is None and is_weight and site.both_ways and not rule.adapts_both_ways:
        reason = (
            f"its operations read it both as (out, in) and as (in, out), and {type(rule).__name__} knows one of them"
        )
    if reason is None and site.op is ops.Weight:
        reason = rule.unmergeable(site)  # there, its change is all that a rule has
    replaced = _replaced(rule, site, config, plan.report.adapter) if reason is None else {}
    if replaced:
        reason = overrides.refusal(plan.modules[site.owner]) or site.unmergeable
    if reason is not None:
        return reason
    specs, constants = rule.parameters(site, config), rule.all_constants(site, config)
    reason = contradiction(specs, constants)
    if reason is not None:
        raise AdaptError(f"{config.method}: {reason}")
    _refuse_unknown_arguments(rule, site, (*specs, *constants), config)
    in_holder = names_in_holder(specs, constants, site.prefix)
    names = {name: name_at(plan.report.adapter, path, rule.held_in) for name, path in in_holder}
    is_mergeable = isinstance(rule, Mergeable)
    has_bias = is_mergeable and rule.changes_bias
    # a bias without a place to be merged into is no matter of the weight
    is_change = is_mergeable and (has_bias or rule.unmergeable(site) is None)
    return AdaptedSite(site, rule, specs, constants, names, in_holder, dtype, is_change, replaced=replaced)


def _refuse_no_rule(rule: Any) -> None:
    """Raises AdaptError for what is no rule, or isn't a value, since graphs are shared by equal rules."""
    reason = lacking_base(type(rule))
    if reason is not None:
        raise AdaptError(reason)
    try:
        hash(rule)
    except TypeError as error:
        name = type(rule).__name__
        raise AdaptError(f"{name} can't be a rule: {error}; make it a dataclass with frozen=True") from error


def _refuse_unknown_arguments(rule: Any, site: Any, own: tuple[str, ...], config: PeftConfig) -> None:
    """Raises AdaptError if a function of a rule asks for something of which nothing is known, as by a slip."""
    read = tuple([name for name, _ in site.reads])
    kind = Site if isinstance(site, Site) else type(site)
    reason = unknown_argument(rule, kind, site.op, own + read)
    if reason is not None:
        raise AdaptError(f"{config.method}: {reason}; name a parameter or a constant of the rule, or give a default")


def _replaced(rule: Any, site: Any, config: PeftConfig, adapter: str) -> Mapping[str, str]:
    if not rule.replaces(site, config):
        return {}
    return {site.attribute: overrides.override_name(site.attribute, adapter)}


def _shared(
    plan: Plan, site: Any, specs: Mapping[str, ParameterSpec], names: Mapping[str, str], dtype: torch.dtype
) -> dict[str, tuple[str, str]]:
    """Returns the places of the parameters of a site that sites before it have, too, and notes those that are new."""
    found = {}
    for local, spec in specs.items():
        if spec.scope is None:
            continue
        own = Scoped(site.label, (site.owner, names[local]), spec, dtype)
        first = plan.scopes.setdefault(spec.scope, own)
        if _unlike(first, own):
            raise AdaptError(
                f"{plan.config.method}: {site.label} and {first.label} can't share {local}: it is {spec.key} of shape "
                f"{tuple(spec.shape)} and {dtype} at the one, and {first.spec.key} of shape {tuple(first.spec.shape)} "
                f"and {first.dtype} at the other; target them with an adapter each"
            )
        scopes = plan.scopes.items()
        others = [of.label for scope, of in scopes if of.spec.key == spec.key and scope != spec.scope]
        if spec.written_once and others:
            raise AdaptError(
                f"{plan.config.method}: {site.label} and {others[0]} would write {spec.key} once each: give what isn't "
                "shared by all another key"
            )
        if first.place != own.place:
            found[local] = first.place
    return found


def _unlike(one: Scoped, other: Scoped) -> bool:
    """Returns whether two parameters of one scope can't be one tensor."""
    once = one.spec.written_once or other.spec.written_once
    names = {(of.spec.written_once, of.spec.key) for of in (one, other)}
    return (one.spec.shape, one.dtype) != (other.spec.shape, other.dtype) or (once and len(names) > 1)


def _refuse_replaced_twice(plan: Plan) -> None:
    """Refuses sites whose weight has a frozen override and is to be fully trained."""
    for adapted in plan.sites:
        both = set(adapted.replaced) & set(plan.fully_trained.get(adapted.site.owner, ()))
        if both:
            reason = f"modules_to_save fully trains its {both.pop()}, in whose place the adapter has a frozen one"
            plan.report.refused.append(Refusal(adapted.site.name, reason, adapted.site.way_out))


def dtype_of_adapter(dtype: torch.dtype, autocast: bool) -> torch.dtype:
    """Returns the dtype of an adapter's tensors at a weight of this dtype."""
    return torch.float32 if autocast and dtype in HALVES else dtype
