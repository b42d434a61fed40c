"""Layers that a graph hands to code that it only calls, where that code may read their weights."""

from __future__ import annotations

from collections.abc import Set
from types import FunctionType
from typing import Any

from torch import fx, nn

from graphpeft.code.attribute_paths import ANY
from graphpeft.code.source import functions_called, read_by, uses_in_forward
from graphpeft.graph import in_place
from graphpeft.graph.errors import TraceError
from graphpeft.graph.holders import tree_of
from graphpeft.graph.template import Template


def refuse_handed_layers(template: Template, module: nn.Module) -> None:
    """Raises TraceError if a graph hands a layer to a module or a function that may read its weights.

    Such a graph doesn't show the use of the weight.

    Args:
        template: The graphs of the module's forward.
        module: The module.
    """
    for graph in template.graphs:
        for node in graph.nodes:
            layer = _module_at(module, str(node.target)) if node.op == "get_attr" else None
            for user in node.users:
                if layer is None:
                    break
                read = _read_by(user, module)
                weights = {path.rpartition(".")[2] for path, _ in layer.named_parameters()} & read
                if weights or ANY in read:
                    raise TraceError(
                        f"it hands its {node.target} to {user.target}, which may read {', '.join(weights) or 'weights'}"
                    )


def _module_at(module: nn.Module, path: str) -> nn.Module | None:
    value: Any = module
    for name in path.split("."):
        value = value._modules.get(name)
        if value is None:
            return None
    return value


def _read_by(user: fx.Node, module: nn.Module) -> Set[str]:
    """Returns the attribute names that what a node calls may read from its arguments; `ANY` if it may be any."""
    if user.op == "call_module":
        called = module.get_submodule(str(user.target))
        classes = {in_place.original_class(inner) for inner in tree_of(called)}
        return set().union(*(uses_in_forward(cls).read_elsewhere for cls in classes)) - {ANY}
    if isinstance(user.target, FunctionType):
        return set().union(*map(read_by, functions_called([user.target])))
    return set()
