"""Reads operations of a graph: their arguments, by position or by name, and the layers that they call."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torch.fx.node import map_aggregate

from graphpeft.graph import in_place
from graphpeft.graph.hosts.patched_forwards import patched_forward
from graphpeft.graph.recorded import recorded
from graphpeft.graph.settings import is_number
from graphpeft.graph.tags import read_before
from graphpeft.graph.template import template_of


def in_graph(value: Any, beside: fx.Proxy) -> Any:
    """Returns an option of an operation for code on proxies: with a proxy in place of each node."""

    def as_proxy(part: Any) -> Any:
        return fx.Proxy(part, beside.tracer) if isinstance(part, fx.Node) else part

    return map_aggregate(value, as_proxy)


@recorded
def applied_if(condition: bool, otherwise: Any, function: str, x: Any, weight: Any, options: dict[str, Any]) -> Any:
    """Returns a PyTorch function's result on `x` and `weight` in runs where `condition` holds, else `otherwise`."""
    if not condition:
        return otherwise
    return (getattr(F, function, None) or getattr(torch, function))(x, weight, **options)


def arguments_of(node: fx.Node, *names: str) -> list[Any]:
    """Returns the arguments of a call, given by position or by name, in the order of `names`."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name) for name in names]


def path_of(value: Any) -> str | None:
    """Returns the path of the attribute that a node reads, with or without changes by adapters, or None."""
    if not isinstance(value, fx.Node):
        return None
    *_, first = read_before(value)
    return str(first.target) if first.op == "get_attr" else None


def is_computed(option: Any) -> bool:
    """Returns whether an option of an operation is computed in each run, not only read from a module."""
    return isinstance(option, fx.Node) and option.op != "get_attr" and not is_number(option)


def plain_layer(node: fx.Node, root: nn.Module, *classes: type[nn.Module]) -> nn.Module | None:
    """Returns the module that a node calls, if it runs the forward of one of `classes`; else None."""
    module = root.get_submodule(str(node.target))
    if isinstance(module, torch.jit.ScriptModule):
        return None
    forward = in_place.original_class(module).forward
    # a subclass, an instance's own forward or an edited graph may compute something else than the class
    if all(forward is not cls.forward for cls in classes) or patched_forward(module) is not None:
        return None
    template = template_of(module)
    return module if template is None or template.shared else None
