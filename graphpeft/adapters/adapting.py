"""Adapts a model by a config: plans it, refuses what can't be, and carries the plan out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Set
from typing import Any

from torch import nn

from graphpeft.adapters import adapter_names, lifecycle
from graphpeft.adapters.empty_tensors import empty
from graphpeft.adapters.exchanged import refuse_exchanged_classes
from graphpeft.adapters.merging import with_originals
from graphpeft.adapters.plan import AdaptError, NoMatchingPeftModuleError, Plan, make_plan
from graphpeft.adapters.replication import Replication, replicate
from graphpeft.adapters.state import Adapter, Adapters, Tensors, adapters_of
from graphpeft.adapters.trainable import freeze, set_trainable
from graphpeft.adapters.training import has_penalty
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.paths import STATE, modules_by_path
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import Role
from graphpeft.rules.peft_names import TaskType
from graphpeft.sites.finder import NOTHING_KNOWN, Known
from graphpeft.sites.site import Site
from graphpeft.targeting.targeting import kept_out_entries, unmatched_entries
from graphpeft.targeting.targets import match_parameter
from graphpeft.targeting.task_heads import lacking_head
from graphpeft.transaction import set_attribute, set_item, transaction
from graphpeft.wording import joined

Where = Callable[[Any], bool]
"""Says of a site whether it is meant."""


Methods = Callable[[nn.Module, TaskType | None], None]
"""Gives a model the methods of an adapted one, inside a transaction; takes the task of its first adapter."""


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns a model's modules by path."""
    return modules_by_path(model)


def known_adapters(model: nn.Module) -> Adapters:
    """Returns the adapters of a model."""
    state = adapters_of(model)
    if state is None:
        raise AdaptError(f"the {type(model).__name__} has no adapters; adapt it with get_peft_model first")
    return state


def known_adapter(model: nn.Module, name: str) -> Adapter:
    """Returns an adapter of a model."""
    state = known_adapters(model)
    if isinstance(name, list):
        raise AdaptError(f"adapter_name is {name!r}, as active_adapter is while several are active; pass one name")
    unknown = adapter_names.unknown([name], state.by_name)
    if unknown is not None:
        raise AdaptError(f"{unknown}; the model has {sorted(state.by_name)}")
    return state.by_name[name]


def add_new(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    example_inputs: ExampleInputs | None,
    autocast_adapter_dtype: bool,
    where: Where | None,
    *,
    activates: bool,
    is_empty: bool = False,
    methods: Methods,
) -> None:
    """Gives a model a new adapter."""
    with transaction(model):
        replication = replicate_layers(model, config)
        plan = plan_for(model, config, adapter_name, example_inputs, autocast_adapter_dtype, where)
        refuse(plan)
        warn_of_mistakes(config, plan, stacklevel=4)
        carry_out(model, adapter_name, plan, None, activates, methods, replication)
        if is_empty:
            empty(modules_of(model), known_adapter(model, adapter_name))


def replicate_layers(model: nn.Module, config: PeftConfig) -> Replication | None:
    """Lets a model have the layers that `config` asks for, and returns what was exchanged for them."""
    state = adapters_of(model)
    return replicate(model, config, state.replication if state is not None else None, state is not None)


def plan_for(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    example_inputs: ExampleInputs | None,
    autocast_adapter_dtype: bool,
    where: Where | None = None,
) -> Plan:
    """Returns what `config` does to a model for a new adapter."""
    state = adapters_of(model)
    reason = adapter_names.refusal(adapter_name)
    if reason is not None:
        raise AdaptError(reason)
    if state is not None and adapter_name in state.by_name:
        raise AdaptError(
            f"the model has an adapter {adapter_name!r} already; choose another adapter_name, or call delete_adapter() "
            "or unload() first"
        )
    if state is not None:
        refuse_conflict(config, state, adapter_name)
    return planned(model, config, adapter_name, example_inputs, autocast_adapter_dtype, where)


def refuse_conflict(config: PeftConfig, state: Adapters, adapter_name: str) -> None:
    """Raises AdaptError if a model can't have an adapter of this config and name beside its others."""
    others = {name: other.config for name, other in state.by_name.items() if name != adapter_name}
    reason = config.conflict(others)
    if reason is not None:
        raise AdaptError(reason)


def planned(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    example_inputs: ExampleInputs | None = None,
    autocast_adapter_dtype: bool = True,
    where: Where | None = None,
) -> Plan:
    """Returns what `config` does to a model, which may be adapted, and may have an adapter of this name."""
    state = adapters_of(model)
    if state is not None:
        refuse_exchanged_classes(modules_of(model), state)
    with contextlib.ExitStack() as stack:
        if state is not None and state.merged and type(config).measured is not PeftConfig.measured:
            stack.enter_context(with_originals(modules_of(model), state))
        return make_plan(
            model,
            config,
            adapter_name,
            known=Known(state.lifted, state.found) if state is not None else NOTHING_KNOWN,
            example_inputs=example_inputs,
            autocast_adapter_dtype=autocast_adapter_dtype,
            where=where,
        )


def refuse(plan: Plan) -> None:
    """Raises AdaptError if a plan can't be carried out whole."""
    if plan.report.nothing_matched:
        raise NoMatchingPeftModuleError(plan.report.nothing_matched)
    refused = plan.report.refused
    if refused:
        reasons = joined([f"{refusal.name}: {refusal.reason}" for refusal in refused], "; ")
        ways_out = "; ".join(dict.fromkeys(refusal.way_out for refusal in refused))
        raise AdaptError(f"can't adapt {reasons}. Ways out: {ways_out}.")


def carry_out(
    model: Any,
    name: str,
    plan: Plan,
    values: Tensors | None,
    activates: bool,
    methods: Methods,
    replication: Replication | None = None,
) -> None:
    """Carries out a plan, inside a transaction."""
    modules = plan.modules
    present = adapters_of(model)
    state = Adapters.before_any(modules) if present is None else present
    lifecycle.add(modules, state, name, plan, values)
    touched = [name]
    if activates:
        touched = [*state.active, name]
        lifecycle.activate(modules, state, [name])
    if has_penalty(plan.config):
        set_attribute(state, "has_penalties", True)
    if replication is not None:
        set_attribute(state, "replication", replication)
    if present is not None:
        set_trainable(modules, state, touched)
        return
    set_item(model.__dict__, STATE, state)
    methods(model, plan.config.task_type)
    freeze(modules, state)


def warn_of_mistakes(config: PeftConfig, plan: Plan, stacklevel: int = 3) -> None:
    """Warns of options that have a meaning, but hardly the one that the caller intends."""
    trained = {*plan.fully_trained, *(adapted.site.owner for adapted in plan.sites)}
    found = (
        _in_vain(config, plan),
        lacking_head(config, plan.modules, trained),
        *_changed_in_two_ways(plan, trained),
    )
    for text in found:
        if text is not None:
            warnings.warn(text, PeftWarning, stacklevel=stacklevel)


def _in_vain(config: PeftConfig, plan: Plan) -> str | None:
    """Returns a warning of names that match nothing or have no effect, if others match: slips, or for other models."""
    if plan.report.nothing_matched:
        return None
    unmatched = unmatched_entries(config, plan.modules, plan.report)
    kept_out = kept_out_entries(config, plan.config, plan.modules, plan.report)
    if kept_out:
        entries = joined([repr(entry) for entry in kept_out])
        unmatched.append(f"{entries} in target_modules, since modules_to_save trains that fully, without an adapter")
    model = type(plan.modules[""]).__name__
    return f"the config names what has no effect on {model}: {'; '.join(unmatched)}" if unmatched else None


def _changed_in_two_ways(plan: Plan, trained: Set[str]) -> Iterator[str]:
    """Yields which weights are adapted and fully trained, and which tied ones are changed at one place, as in PEFT."""
    sites = [adapted.site for adapted in plan.sites if isinstance(adapted.site, Site)]
    both = [site.label for site in sites if site.attribute in plan.fully_trained.get(site.owner, ())]
    options = plan.config.target_options
    parameters = [label for label in both if match_parameter(options, label)]
    others = [label for label in both if label not in parameters]
    if others:
        yield (
            f"modules_to_save={plan.config.modules_to_save} fully trains {joined(others)} beside the adapter there, as "
            "in PEFT, which takes an entry for the end of a path; name whole modules if you mean others"
        )
    if parameters:
        yield (
            f"modules_to_save={plan.config.modules_to_save} fully trains {joined(parameters)} beside the adapter that "
            "target_parameters puts there, as in PEFT; name a weight in one of them if you mean one"
        )
    if getattr(vars(plan.modules[""]).get("config"), "tie_word_embeddings", False):
        yield from _changed_alone(plan, trained)


def _changed_alone(plan: Plan, trained: Set[str]) -> Iterator[str]:
    """Yields which of a model's embedding and head is adapted or trained alone, though they have one weight."""
    weights = {path: module._parameters.get("weight") for path, module in plan.modules.items()}
    for path in sorted(trained):
        others = [other for other, weight in weights.items() if weight is not None and weight is weights[path]]
        alone = [other for other in others if other not in trained]
        if alone:
            option = f"; set {tying}=True to keep them one" if (tying := plan.config.option_for(Role.TYING)) else ""
            yield (
                f"Model has `tie_word_embeddings=True`: {path} has one weight with {joined(alone)}, and is changed "
                f"alone, so they become two, and may not merge{option}"
            )
