"""Weights that a layer computes from other tensors: by a parametrization, or by a hook before its forward.

``torch.nn.utils.parametrizations.weight_norm`` and its kind make ``weight`` a property that computes; the older
``torch.nn.utils.weight_norm`` and ``spectral_norm``, and pruning, set it as a plain attribute before each call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from graphpeft.graph.own_tensors import own_tensor


class Computed(NamedTuple):
    """The way in which a layer computes a weight.

    Attributes:
        path: The path in the layer of the module that owns one of the tensors from which it is computed.
        name: The tensor's name there.
        by: The parametrization or hook that computes it.
    """

    path: str
    name: str
    by: str


def computed_from(module: nn.Module, attribute: str) -> Computed | None:
    """Returns how a module computes its `attribute`; None if that is a parameter, or nothing of the kind."""
    if module._parameters.get(attribute) is not None:
        return None
    if parametrize.is_parametrized(module, attribute):
        path = f"parametrizations.{attribute}"
        parametrizations = module.get_submodule(path)
        by = ", ".join(type(part).__name__.strip("_") for part in parametrizations.children())
        return Computed(path, next(iter(parametrizations._parameters)), by)
    hook = _hook_for(module, attribute)
    own = next((name for name in module._parameters if name.startswith(f"{attribute}_")), None)
    return None if hook is None or own is None else Computed("", own, type(hook).__name__)


def read_weight(module: nn.Module, attribute: str) -> torch.Tensor | None:
    """Returns a module's parameter, or a weight that it computes; None if it has neither."""
    own = module._parameters.get(attribute)
    if own is not None or computed_from(module, attribute) is None:
        return own
    hook = _hook_for(module, attribute)
    # what such a hook sets is of the last call: other values, another dtype or device may have come since
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(module)
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(module)
    return own_tensor(module, attribute)


def read_as_attributes(graph: fx.Graph, module: nn.Module) -> None:
    """Lets a module's graph read what parametrizations compute as the attributes that its code reads."""
    for node in list(graph.nodes):
        layer, is_of_one, name = str(node.target).rpartition("parametrizations.")
        if (
            node.op != "call_module"
            or not is_of_one
            or not parametrize.is_parametrized(module.get_submodule(layer.removesuffix(".")), name)
        ):
            continue
        with graph.inserting_before(node):
            read = graph.create_node("get_attr", f"{layer}{name}")
        read.meta = node.meta
        node.replace_all_uses_with(read)
        graph.erase_node(node)


def _hook_for(module: nn.Module, attribute: str) -> Any:
    """Returns the hook that computes a plain attribute before the forward, or None; pruning has such hooks, too."""
    if isinstance(vars(module).get(attribute), torch.Tensor):
        for hook in module._forward_pre_hooks.values():
            if attribute in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
                return hook
    return None
