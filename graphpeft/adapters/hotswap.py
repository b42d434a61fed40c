"""Puts another saved adapter in the place of one, under its name.

Where both adapt the same weights in the same shapes, only values are copied, so that compiled code stays as it is.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphpeft.adapters import checkpoint, file_names, lifecycle
from graphpeft.adapters.adapting import Where, known_adapter, known_adapters, planned, refuse, refuse_conflict
from graphpeft.adapters.base_names import other_base, warn_of_other_base
from graphpeft.adapters.exchanged import refuse_missing
from graphpeft.adapters.merging import with_originals
from graphpeft.adapters.plan import AdaptError, Plan
from graphpeft.adapters.replication import replicate
from graphpeft.adapters.state import Adapter, Adapters, Modules, Tensors, options_of
from graphpeft.adapters.swappable import (
    fitting,
    make_swappable,
    same_specs,
    set_number,
    without_effect,
)
from graphpeft.adapters.tensors import complete, is_completed
from graphpeft.adapters.trainable import set_trainable
from graphpeft.graph.autocast import HALVES
from graphpeft.graph.holders import place_of, tensor_at
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.paths import join, unwrapped
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.given_config import ConfigLike, as_config
from graphpeft.stacks.reading import read_for
from graphpeft.transaction import remember, set_attribute, transaction
from graphpeft.wording import joined


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | torch.device | None = None,  # noqa: ARG001
    *,
    example_inputs: ExampleInputs | None = None,
    **options: Any,
) -> None:
    """Replaces an adapter by a saved one, which takes over its name and whether it is active and trained.

    If the saved one adapts the same weights with the same ranks, its values are copied, and a compiled model isn't
    compiled again (unless the scale differs). After `prepare_model_for_compiled_hotswap`, ranks and scales may differ.
    Otherwise the whole adapter is replaced, which PEFT refuses for other targets; a compiled model is compiled again at
    its next call. A forward that runs in another thread may see the change half done, see `PeftModel`.

    Args:
        model: An adapted model, or what ``torch.compile`` made of it.
        model_name_or_path: A folder, or a repository on the Hub.
        adapter_name: The adapter that is replaced.
        torch_device: Accepted for compatibility with PEFT; tensors stay on the devices of their weights.
        example_inputs: A tuple of positional or a dict of keyword arguments of the model; needed where adapting the
            model by the saved config needs them.
        options: `use_safetensors`, and options of ``huggingface_hub.hf_hub_download``.

    Raises:
        AdaptError: If there is no such adapter, it is merged, or it is of another method; the model is as it was.
        CheckpointError: If the file doesn't fit the model; likewise.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> model.save_pretrained("adapter")
        >>> hotswap_adapter(model, "adapter", "default")
    """
    model = unwrapped(model)
    _swappable(model, adapter_name)
    saved = read_for(model, model_name_or_path, hub_options=options)
    of_base = other_base(model, saved.config)
    plan = _planned(model, adapter_name, saved.config, saved.tensors, example_inputs)
    values = _fitted(model, adapter_name, plan, saved.tensors, of_base)
    saved.refuse_two_saves(model_name_or_path)
    warn_of_other_base(model, saved.config, stacklevel=3)
    _swap(model, adapter_name, plan, values)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: ConfigLike,
    parameter_prefix: str = "lora_",
    *,
    example_inputs: ExampleInputs | None = None,
) -> None:
    """Replaces an adapter by the one in a state dict, as `hotswap_adapter` does by a saved one.

    Args:
        model: An adapted model, or what ``torch.compile`` made of it.
        state_dict: The tensors by their names in files, with or without the adapter's name in them, and with or without
            the prefix ``base_model.model.``. Where it has none for a weight that the config names, that isn't adapted.
        adapter_name: The adapter that is replaced.
        config: The config of the new one, of this library or of PEFT.
        parameter_prefix: The begin of the names of the method's tensors.
        example_inputs: A tuple of positional or a dict of keyword arguments of the model; needed where adapting the
            model by the config needs them.

    Raises:
        AdaptError: If there is no such adapter, it is merged, or it is of another method; the model is as it was.
        CheckpointError: If the state dict doesn't fit the model; likewise.

    Examples:
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
        >>> values = {"0.lora_A.default.weight": torch.ones(2, 4), "0.lora_B.default.weight": torch.ones(4, 2)}
        >>> hotswap_adapter_from_state_dict(model, values, "default", config)
        >>> model[0].default.lora_B[0, 0].item()
        1.0
    """
    model = unwrapped(model)
    _swappable(model, adapter_name)
    given = copy.deepcopy(as_config(config))
    values = {_name_in_file(key, adapter_name, parameter_prefix): tensor for key, tensor in state_dict.items()}
    of_base = other_base(model, given)
    plan = _planned(model, adapter_name, given, values, example_inputs)
    lacking = _lacking(adapter_name, plan, values)
    if lacking:
        plan = _planned(model, adapter_name, given, values, example_inputs, lambda site: _of(site) not in lacking)
    _swap(model, adapter_name, plan, _fitted(model, adapter_name, plan, values, of_base))


def _name_in_file(key: str, adapter: str, prefix: str) -> str:
    """Returns a tensor's name in files: ``base_model.model.0.lora_A.weight`` for ``0.lora_A.default.weight``."""
    module, dot, name = f".{key}".rpartition(f".{prefix}")
    first, *rest = name.split(".")
    if dot and rest[:1] == [adapter]:
        key = f"{module}{dot}{'.'.join((first, *rest[1:]))}"[1:]
    return file_names.PREFIX + key.removeprefix(file_names.PREFIX)


def _swappable(model: nn.Module, name: str) -> Adapter:
    """Returns the adapter of this name; raises AdaptError if it can't be replaced now."""
    adapter = known_adapter(model, name)
    if name in known_adapters(model).merged:
        raise AdaptError(f"{name!r} is merged into the weights; call unmerge_adapter() before you swap it")
    return adapter


def _planned(
    model: nn.Module,
    name: str,
    config: PeftConfig,
    values: Mapping[str, torch.Tensor],
    example_inputs: ExampleInputs | None,
    where: Where | None = None,
) -> Plan:
    """Returns the plan of a new adapter in the place of one, with room for other ranks where that has it."""
    adapter, state = known_adapter(model, name), known_adapters(model)
    if config.method != adapter.config.method:
        raise AdaptError(
            f"{name!r} is a {adapter.config.method} adapter, and the saved one is of {config.method}; delete the one "
            "and load the other"
        )
    refuse_conflict(config, state, name)
    config.inference_mode = adapter.config.inference_mode
    replicate(model, config, state.replication, is_adapted=True)
    autocast = all(adapted.dtype not in HALVES for adapted in adapter.sites)
    plan = planned(model, config.fitted_to(values), name, example_inputs, autocast, where)
    refuse(plan)
    if adapter.padded_to is not None:
        present = {_of(adapted.site): adapted for adapted in adapter.sites}
        plan.sites[:] = [
            fitting(adapted, present[_of(adapted.site)]) if _of(adapted.site) in present else adapted
            for adapted in plan.sites
        ]
    return plan


def _lacking(name: str, plan: Plan, values: Mapping[str, torch.Tensor]) -> set[tuple[str, str]]:
    """Returns the sites of a plan of which there is no value."""
    keys = file_names.keys(Adapter.of(plan), name, plan.modules)
    places = {place for key, place in keys.items() if key in values}
    return {
        _of(adapted.site)
        for adapted in plan.sites
        if places.isdisjoint((adapted.site.owner, own) for own in adapted.names.values())
    }


def _fitted(model: nn.Module, name: str, plan: Plan, values: Mapping[str, torch.Tensor], of_base: str) -> Tensors:
    """Returns the tensors of a new adapter by their places, which fit the plan."""
    adapter, swapped = known_adapter(model, name), Adapter.of(plan)
    fitted = checkpoint.fitted(swapped, name, plan.modules, known_adapters(model).originals, values, of_base)
    own = [join(*place) for place in fitted if place not in set(swapped.tensor_names(name))]
    own += [join(*place) for place in adapter.overwritten]
    if own:
        raise AdaptError(
            f"the file of {name!r}, or of the saved one, has other values of the model's own {joined(own)}, which "
            "can't be swapped; delete the one and load the other"
        )
    return fitted


def _swap(model: nn.Module, name: str, plan: Plan, values: Tensors) -> None:
    """Replaces an adapter by that of a plan: its values alone where that is possible, or else the whole of it."""
    adapter = known_adapter(model, name)
    sites = _sites_after(adapter, plan)
    with transaction(model):
        if sites is not None:
            refuse_missing(plan.modules, adapter, name)
            _copy(plan.modules, adapter, plan, sites, values)
            if is_completed(adapter):
                with with_originals(plan.modules, known_adapters(model)):
                    complete(plan.modules, adapter, name)
            return
        exchange(model, name, plan, values)


def _sites_after(adapter: Adapter, plan: Plan) -> list[AdaptedSite] | None:
    """Returns the adapter's sites with the plan's numbers, or None if the plan needs other tensors or graphs.

    Where the plan has no site and zeros have no effect, there will be zeros, if the adapter is prepared for that.
    """
    if (adapter.fully_trained, adapter.rows, adapter.infixes) != (plan.fully_trained, plan.rows, plan.infixes):
        return None
    new = {_of(adapted.site): adapted for adapted in plan.sites}
    found: list[AdaptedSite] = []
    for adapted in adapter.sites:
        one = new.pop(_of(adapted.site), None)
        if one is None:
            lacking = without_effect(adapted) if adapter.padded_to is not None else None
            if lacking is None:
                return None
            found.append(lacking)
        elif adapted.replaced or one.replaced or any(not spec.is_saved for spec in one.specs.values()):
            return None  # what is left of a weight, and what no file has, is worked out anew
        elif _in_graphs(one) != _in_graphs(adapted) or not same_specs(one.specs, adapted.specs):
            return None
        else:
            found.append(adapted._replace(constants=one.constants, specs=one.specs))
    return None if new else found


def _of(site: Any) -> tuple[str, str]:
    return site.owner, site.label


def is_the_same(
    model: nn.Module,
    name: str,
    config: PeftConfig,
    values: Mapping[str, torch.Tensor],
    example_inputs: ExampleInputs | None,
) -> bool:
    """Returns whether a saved adapter is at the places of one in the model, in the same shapes and with its numbers.

    Configs may say that in different words, such as patterns for ends of names and for whole ones.
    """
    adapter = known_adapter(model, name)
    sites = _sites_after(adapter, _planned(model, name, copy.deepcopy(config), values, example_inputs))
    before = [adapted.constants for adapted in adapter.sites]
    return sites is not None and [adapted.constants for adapted in sites] == before


def _in_graphs(adapted: AdaptedSite) -> tuple[Any, ...]:
    return adapted.rule, adapted.names, adapted.dtype, adapted.constants.keys()


@torch.no_grad()
def _copy(modules: Modules, adapter: Adapter, plan: Plan, sites: list[AdaptedSite], values: Tensors) -> None:
    for place in adapter.tensor_names(plan.report.adapter):
        tensor = tensor_at(modules[place[0]], place[1])
        remember(tensor)
        if place in values:
            tensor.copy_(values[place])
    for adapted in sites:
        owner = modules[adapted.site.owner]
        for local, spec in adapted.specs.items():
            if not spec.is_saved:
                tensor_at(owner, adapted.names[local]).zero_()
        for name, value in adapted.constants.items():
            holder, own = place_of(owner, adapted.names[name])
            set_number(vars(holder), own, value)
    adapter.exchange_sites(sites)
    set_attribute(adapter, "config", plan.config)
    set_attribute(adapter, "made_with", options_of(plan.config))
    set_attribute(adapter, "report", plan.report)


def exchange(model: nn.Module, name: str, plan: Plan, values: Tensors | None = None) -> Adapters:
    """Exchanges an adapter for a plan's, which is active and trained as the old one was; all or nothing."""
    modules, state = plan.modules, known_adapters(model)
    order, active, room = list(state.by_name), list(state.active), state.by_name[name].padded_to
    with transaction(model):
        lifecycle.unmerge_first(modules, state)  # since one that is merged can't be taken off
        lifecycle.activate(modules, state, [])  # so that nodes come in their order
        lifecycle.remove(modules, state, name)
        lifecycle.add(modules, state, name, plan, values)
        if room is not None:
            make_swappable(modules, state.by_name[name], room)
        lifecycle.activate(modules, state, active)
        set_attribute(state, "by_name", {known: state.by_name[known] for known in order})
        set_trainable(modules, state, active if name in active else [name])
    return state
