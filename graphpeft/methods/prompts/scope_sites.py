"""The modules that get virtual tokens of their own, by the names in `prompt_scope`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.graph.errors import TraceError
from graphpeft.methods.prompts.scope_masks import CAUSAL
from graphpeft.rules.options import TargetOptions
from graphpeft.rules.report import Refusal, Report
from graphpeft.sites.calls import boundary
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite
from graphpeft.targeting import targets
from graphpeft.wording import joined

SCOPE = "scope"
"""The role of modules that get virtual tokens of their own."""


def scope_sites(
    scope: str | Sequence[str], position: str, finder: SiteFinder, report: Report, dtype: torch.dtype
) -> tuple[list[CallSite], list[int]]:
    """Returns the boundaries of the modules that a scope names, and the sizes of a token that example inputs show."""
    named = TargetOptions(target_modules=scope)
    paths = [path for path in finder.modules if path and targets.match(named, path)]
    if not paths:
        near = targets.near_misses(scope, [path for path in finder.modules if path])
        hint = f"; near misses: {', '.join(near)}" if near else ""
        report.refused.append(Refusal("prompt_scope", f"{scope!r} names no module{hint}", "name a module by its path"))
    sites, sizes = [], []
    for path in paths:
        try:
            _refuse_what_cannot_see(finder.modules[path], position)
            site, size = _scope_site(path, finder, dtype)
        except TraceError as error:
            report.refused.append(Refusal(path, str(error), _way_out(finder.modules[path], path)))
            continue
        sites.append(site)
        sizes += size
    return sites, sizes


def _scope_site(path: str, finder: SiteFinder, dtype: torch.dtype) -> tuple[CallSite, list[int]]:
    crossing = boundary(finder.regions, path)
    if not crossing.arguments:
        raise TraceError("its forward takes no arguments")
    sequence = crossing.arguments[0]
    inputs = crossing.values or finder.regions.inputs_of(path)
    size = [] if inputs is None else [_token_size(inputs, sequence)]
    beside = next(((owner, name) for owner, name in _tensors(path, finder.modules)), None)
    if beside is None:
        raise TraceError("the model has no parameters, which would tell the device of virtual tokens")
    region, nodes, arguments = crossing[:3]
    return CallSite(region, nodes, path, SCOPE, beside, dtype, arguments, file_path=path), size


def _refuse_what_cannot_see(module: nn.Module, position: str) -> None:
    """Raises TraceError if the attentions in a module would not see virtual tokens at `position`."""
    for path, inner in module.named_modules():
        if getattr(inner, "batch_first", True) is False:
            raise TraceError(
                f"{path or 'it'} takes sequences of shape (tokens, batch, dim), and a prompt goes into (batch, tokens, "
                "dim); build it with batch_first=True"
            )
        if position == "after" and getattr(inner, CAUSAL, False) is True:
            raise TraceError(f"{path or 'it'} is causal: no token sees what stands after it; put the prompt before")


def _token_size(inputs: Any, name: str) -> int:
    value = inputs.get(name) if isinstance(inputs, dict) else inputs[0]
    if not isinstance(value, Tensor) or value.ndim != 3:
        what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"that is a {type(value).__name__}"
        raise TraceError(f"it is given {name} {what}, which is no token sequence (batch, tokens, dim)")
    return value.shape[-1]


def _way_out(module: nn.Module, path: str) -> str:
    inside = [f"{path}.{name}" for name, _ in module.named_children()]
    is_container = inside and type(module).forward is nn.Module.forward
    return (
        f"name modules inside it, such as {joined(inside)}" if is_container else "name another module in prompt_scope"
    )


def _tensors(path: str, modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """Returns parameters, those inside the module at `path` first."""
    inside = [other for other in modules if other == path or other.startswith(f"{path}.")]
    return [
        (owner, name)
        for owner in (*inside, *modules)
        for name, tensor in modules[owner]._parameters.items()
        if tensor is not None
    ]
