"""The sites of adapters as a picture has them: the rule, the tensors, and how much the weight changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.changes import delta
from graphpeft.adapters.merged_weights import Originals
from graphpeft.graph.holders import has_tensor, tensor_at
from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.paths import join, within
from graphpeft.learning.norms import norm_of
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.showing.nodes import shape_of
from graphpeft.showing.picture import DrawnSite, DrawnTensor
from graphpeft.sites.site import Site


def drawn_site(adapted: AdaptedSite, adapter: int, slot: int, modules: Mapping[str, nn.Module]) -> DrawnSite:
    """Returns a site of an adapter as a picture has it.

    Args:
        adapted: The site.
        adapter: The place of the adapter among the picture's.
        slot: The adapter's slot.
        modules: The model's modules by path.
    """
    site: Any = adapted.site
    owner = modules[site.owner]
    relative = within(site.owner, site.region)
    paths = {name: join(relative, attribute) for name, attribute in adapted.in_slot(slot).items()}
    tensors = [_drawn_tensor(name, paths[name], adapted, owner) for name in adapted.specs]
    return DrawnSite(
        label=site.label,
        op=site.op.__name__,
        size=site.size,
        adapter=adapter,
        nodes=sorted({name for names in site.nodes for name in names}),
        rule=_shown(adapted.rule),
        tensors=tensors,
        merges=adapted.unmergeable or "",
    )


def with_change(
    drawn: DrawnSite, adapted: AdaptedSite, modules: Mapping[str, nn.Module], originals: Originals
) -> DrawnSite:
    """Returns a drawn site with ‖ΔW‖ / ‖W‖, if its adapter changes a weight whose numbers are here.

    Args:
        drawn: The site as it is drawn.
        adapted: The site.
        modules: The model's modules by path.
        originals: The base's weights where other adapters are merged into them.
    """
    if not isinstance(adapted.site, Site) or adapted.unmergeable is not None or not _is_here(adapted, modules):
        return drawn
    with torch.no_grad():
        place = (adapted.site.owner, adapted.site.attribute)
        weight = originals.get(place, own_parameter(modules[adapted.site.owner], adapted.site.attribute))
        left = adapted.replaced.get(adapted.site.attribute)
        if left is None:
            change = delta(adapted, modules, base=originals.get(place))
        else:
            # one that has taken a part of the weight adds to what it has left of it
            change = own_parameter(modules[adapted.site.owner], left) + delta(adapted, modules) - weight
        base, changed = norm_of(weight), norm_of(change)
    return drawn if base == 0 else dataclasses.replace(drawn, change=changed / base)


def _is_here(adapted: Any, modules: Mapping[str, nn.Module]) -> bool:
    owner = modules[adapted.site.owner]
    names = [name for name in adapted.names.values() if has_tensor(owner, name)]
    tensors = [own_parameter(owner, adapted.site.attribute), *(tensor_at(owner, name) for name in names)]
    return all(type(each) in (torch.Tensor, nn.Parameter) and not each.is_meta for each in tensors)


def _drawn_tensor(name: str, path: str, adapted: AdaptedSite, owner: nn.Module) -> DrawnTensor:
    spec, attribute = adapted.specs[name], adapted.names[name]
    if not has_tensor(owner, attribute):
        sizes = " × ".join(map(str, spec.shape)) or "scalar"
        return DrawnTensor(name, path, f"{sizes}, {str(adapted.dtype).removeprefix('torch.')}", spec.is_trained)
    tensor = tensor_at(owner, attribute)
    gradient = None if tensor.grad is None else norm_of(tensor.grad)
    return DrawnTensor(name, path, shape_of(tensor), tensor.requires_grad, gradient)


def _shown(rule: Any) -> str:
    """Returns a rule with those of its options that aren't the defaults."""
    if not dataclasses.is_dataclass(rule):
        return type(rule).__name__
    given = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    plain = {field.name: field.default for field in dataclasses.fields(rule)}
    options = [f"{name}={value!r}" for name, value in given.items() if value != plain[name]]
    return f"{type(rule).__name__}({', '.join(options)})"
