"""Puts another saved adapter in the place of one, under its name.

Where both adapt the same weights in the same shapes, only values are copied, so that compiled code stays as it is.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from graphpeft.adapters import checkpoint, lifecycle
from graphpeft.adapters.adapting import known_adapter, known_adapters, planned, refuse
from graphpeft.adapters.base_names import other_base, warn_of_other_base
from graphpeft.adapters.plan import AdaptError, Plan
from graphpeft.adapters.replication import replicate
from graphpeft.adapters.state import Adapter, Adapters, Modules, Tensors
from graphpeft.adapters.tensors import refuse_missing, set_trainable
from graphpeft.graph.holders import place_of, tensor_at
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.paths import join
from graphpeft.transaction import remember, set_attribute, set_item, transaction, undone_by
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
    compiled again (unless the scale differs). Otherwise the whole adapter is replaced, which PEFT refuses for other
    targets; a compiled model is compiled again at its next call. A forward that runs in another thread may see the
    change half done, see `PeftModel`.

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

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> model.save_pretrained("adapter")
        >>> hotswap_adapter(model, "adapter", "default")
    """
    model = getattr(model, "_orig_mod", model)
    adapter = known_adapter(model, adapter_name)
    state = known_adapters(model)
    if adapter_name in state.merged:
        raise AdaptError(f"{adapter_name!r} is merged into the weights; call unmerge_adapter() before you swap it")
    saved = checkpoint.read(model_name_or_path, **options)
    config, values = saved.config, saved.tensors
    if config.method != adapter.config.method:
        raise AdaptError(
            f"{adapter_name!r} is a {adapter.config.method} adapter, and the saved one is of "
            f"{config.method}; delete the one and load the other"
        )
    config.inference_mode = adapter.config.inference_mode
    replicate(model, config, state.replication, is_adapted=True)
    plan = planned(model, config.fitted_to(values), adapter_name, example_inputs)
    refuse(plan)
    modules = plan.modules
    of_base = other_base(model, saved.config)
    fitted = checkpoint.fitted(Adapter.of(plan), adapter_name, modules, state.originals, values, of_base)
    swapped = Adapter.of(plan)
    of_base = [join(*place) for place in fitted if place not in set(swapped.tensor_names(adapter_name))]
    of_base += [join(*place) for place in adapter.overwritten]
    if of_base:
        raise AdaptError(
            f"the file of {adapter_name!r}, or of the saved one, has other values of the model's own "
            f"{joined(of_base)}, which can't be swapped; delete the one and load the other"
        )
    saved.refuse_two_saves(model_name_or_path)
    warn_of_other_base(model, saved.config, stacklevel=3)
    if _have_same_places(adapter, plan):
        refuse_missing(modules, adapter, adapter_name)
        with transaction(model):
            _copy(modules, adapter, plan, fitted)
    else:
        exchange(model, adapter_name, plan, fitted)


def _have_same_places(adapter: Adapter, plan: Plan) -> bool:
    def places(sites: Any) -> dict[Any, Any]:
        return {(a.site.owner, a.site.label): (a.rule, a.specs, a.names, a.dtype, a.constants.keys()) for a in sites}

    for adapted in (*adapter.sites, *plan.sites):
        if adapted.replaced or any(not spec.is_saved for spec in adapted.specs.values()):
            return False  # what is left of a weight, and what no file has, is worked out anew
    others = (adapter.fully_trained, adapter.rows, adapter.infixes) == (plan.fully_trained, plan.rows, plan.infixes)
    return others and places(adapter.sites) == places(plan.sites)


@torch.no_grad()
def _copy(modules: Modules, adapter: Adapter, plan: Plan, values: Tensors) -> None:
    for (path, attribute), value in values.items():
        tensor = tensor_at(modules[path], attribute)
        remember(tensor)
        tensor.copy_(value)
    constants = {(a.site.owner, a.site.label): a.constants for a in plan.sites}
    undone_by(adapter.sites.__setitem__, slice(None), list(adapter.sites))
    adapter.sites[:] = [a._replace(constants=constants[a.site.owner, a.site.label]) for a in adapter.sites]
    for adapted in adapter.sites:
        for name, value in adapted.constants.items():
            holder, own = place_of(modules[adapted.site.owner], adapted.names[name])
            if vars(holder)[own] != value:
                set_item(vars(holder), own, value)
    set_attribute(adapter, "config", plan.config)


def exchange(model: nn.Module, name: str, plan: Plan, values: Tensors | None = None) -> Adapters:
    """Exchanges an adapter for that of a plan, which is active and trained as the old one was; all or nothing.

    Args:
        model: An adapted model.
        name: The name of both adapters.
        plan: The plan of the new one.
        values: The values of its tensors; without them the method's first values are drawn.

    Returns:
        The model's adapters, in the same order.

    Raises:
        AdaptError: If the new one can't be added; the old one is as it was.
    """
    modules, state = plan.modules, known_adapters(model)
    order, active = list(state.by_name), list(state.active)
    with transaction(model):
        # so that nodes come in their order; first, since it unmerges others with a warning, which may be an error
        lifecycle.activate(modules, state, [])
        lifecycle.remove(modules, state, name)
        lifecycle.add(modules, state, name, plan, values)
        lifecycle.activate(modules, state, active)
        set_attribute(state, "by_name", {known: state.by_name[known] for known in order})
        set_trainable(modules, state, active if name in active else [name])
    return state
