"""Methods that change while they are trained: what they add to the loss, and what they do after a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter, Adapters, Modules
from graphpeft.adapters.trainable import set_trainable
from graphpeft.graph.holders import value_at
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.trained import SiteParameters
from graphpeft.transaction import remember, undone_by


def update_and_allocate(modules: Modules, state: Adapters, step: int) -> None:
    """Lets the adapters that are trained do what their method does after a step, inside a transaction."""
    changing = [adapter for adapter in _trained(state) if changes_after_steps(adapter.config)]
    if not changing:
        raise AdaptError(
            f"no adapter that is trained now changes after a step of training, of {sorted(state.by_name)}; leave "
            "update_and_allocate out, or make an adapter that does so active"
        )
    merged = [name for name in state.merged if state.by_name[name] in changing]
    if merged:
        raise AdaptError(f"{merged} are merged into the weights; call unmerge_adapter() before a step changes them")
    if state.are_off:
        raise AdaptError("the adapters are disabled; enable them before a step of training changes them")
    for adapter in changing:
        sites, named = _parameters(modules, adapter), adapter.config.parameters_changed_by_steps
        for _, parameters in sites:
            for local, tensor in parameters.items():
                if named is None or local in named:
                    remember(tensor)
        # attributes that are set anew go when it fails, too
        undone_by(_put_back, adapter.config, dict(vars(adapter.config)))
        with torch.no_grad():
            try:
                adapter.config.after_step(step, sites)
            except ValueError as error:
                raise AdaptError(str(error)) from error
    let_rest(modules, state)


def let_rest(modules: Modules, state: Adapters) -> None:
    """Lets only those parameters require grad that the methods of active adapters train now."""
    chosen = [name for name in state.active if type(state.by_name[name].config).rests is not PeftConfig.rests]
    set_trainable(modules, state, chosen)


def with_penalty(modules: Callable[[], Modules], state: Adapters, output: Any) -> Any:
    """Returns what a model returned, with the penalties of the adapters that are trained added to its loss."""
    is_plain = type(output) is dict
    loss = output.get("loss") if is_plain else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor):
        return output
    for penalty in penalties(modules, state):
        loss = loss + penalty.to(loss.device)
    if is_plain:
        return {**output, "loss": loss}
    output.loss = loss
    return output


def penalties(modules: Callable[[], Modules], state: Adapters) -> list[torch.Tensor]:
    """Returns the penalties of the adapters that act and are trained."""
    adding = [] if state.are_off else [adapter for adapter in _trained(state) if has_penalty(adapter.config)]
    if not adding:
        return []
    present = modules()
    found = [adapter.config.penalty(_parameters(present, adapter)) for adapter in adding]
    return [penalty for penalty in found if penalty is not None]


def changes_after_steps(config: PeftConfig) -> bool:
    """Returns whether a config's method changes its adapters after a step of training."""
    return type(config).after_step is not PeftConfig.after_step


def has_penalty(config: PeftConfig) -> bool:
    """Returns whether a config's method adds something to the loss."""
    return type(config).penalty is not PeftConfig.penalty


def _trained(state: Adapters) -> list[Adapter]:
    active = [state.by_name[name] for name in state.active]
    return [adapter for adapter in active if not adapter.config.inference_mode]


def _parameters(modules: Modules, adapter: Adapter) -> list[SiteParameters]:
    return [
        SiteParameters(
            adapted.site,
            {local: value_at(modules[adapted.site.owner], adapted.names[local]) for local in adapted.specs},
        )
        for adapted in adapter.sites
    ]


def _put_back(config: PeftConfig, attributes: dict[str, Any]) -> None:
    vars(config).clear()
    vars(config).update(attributes)
