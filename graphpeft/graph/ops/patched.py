"""Patched forwards of layers, each as the operation that the layer's class computes.

A user has set ``layer.forward = new_forward``, and PEFT adds its branch to what that returns, whatever it computes. So
its call is one node with the arguments of the operation that the class computes, for rules that ask for these. Only the
input is used:

    as_patched(x, weight, bias, own_forward=new_forward, …)  =  new_forward(x, …)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

More = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Further arguments of a call, by position and by name."""

_FUNCTIONS: dict[str, Any] = {
    function.__name__: function
    for function in (
        F.linear,
        torch.addmm,
        F.embedding,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
    )
}


def as_patched(*operands: Any, own_forward: Callable[..., Any], more: More, instead_of: str, **_: Any) -> Any:
    """Returns what a patched forward makes of the input of an operation."""
    args, given = more
    return own_forward(operands[_place_of_input(instead_of)], *args, **given)


def patched_operation(graph: fx.Graph, own_forward: fx.Node, operation: fx.Node, x: fx.Node, more: fx.Node) -> fx.Node:
    """Adds the call of a patched forward to a graph, in the place of an operation, with the arguments of that."""
    name = operation.target.__name__  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]
    operands = list(operation.args)
    operands[_place_of_input(name)] = x
    options = {**operation.kwargs, "own_forward": own_forward, "more": more, "instead_of": name}
    return graph.call_function(as_patched, tuple(operands), options)


def _place_of_input(name: str) -> int:
    return 1 if name == "addmm" else 0


def function_of(node: fx.Node) -> Any:
    """Returns the function whose arguments a call has: of the class's operation where it is a patched forward."""
    return _FUNCTIONS[str(node.kwargs["instead_of"])] if node.target is as_patched else node.target


def is_known_function(target: Any) -> bool:
    """Returns whether a patched forward can stand for a call of a function."""
    return _FUNCTIONS.get(getattr(target, "__name__", "")) is target


def first_given(args: tuple[Any, ...], given: Mapping[str, Any], name: str) -> Any:
    """Returns the first argument of a call, which may be given by its name."""
    return args[0] if args else given[name]


def others_given(args: tuple[Any, ...], given: Mapping[str, Any], name: str) -> More:
    """Returns the arguments of a call without the first."""
    return (args[1:], given) if args else ((), {other: value for other, value in given.items() if other != name})
