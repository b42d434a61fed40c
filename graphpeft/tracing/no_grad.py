"""Traces code under ``torch.no_grad()``: detaches its values, and refuses writes into tensors that require grad.

A graph runs with or without gradients, as its caller chooses. So each value in a ``no_grad`` region is `detached`, and
a write in the region may only change a tensor that requires no gradient, such as a buffer.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from graphpeft._torch import DisableTorchFunction, pytree, version
from graphpeft.graph import guards
from graphpeft.graph.dependencies import writes
from graphpeft.graph.errors import TraceError
from graphpeft.graph.template import VALUE
from graphpeft.tracing.gradients import detached
from graphpeft.tracing.recorder import Recorder


def as_without_grad(proxy: fx.Proxy) -> fx.Proxy:
    """Returns a proxy of the detached value; `proxy` itself for a module's tensor or one that can't require grad."""
    node = proxy.node
    if node.op == "get_attr" or node.target is detached or not _may_require_grad(node):
        return proxy
    given = map(proxy.tracer.proxy, node.all_input_nodes)
    return proxy.tracer.create_proxy("call_function", detached, (proxy, *given), {})


def arguments_of_write(tracer: Recorder, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the arguments of a write under ``torch.no_grad()``, detached where the write would pass on gradients."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
    if not any(_may_require_grad(leaf.node) for leaf in leaves):
        return args, kwargs
    # the write would change the gradients of a tensor that requires grad, in this run or in another
    written = kwargs["out"] if "out" in kwargs else args[0] if args else None
    name = _tensor_of_the_module(written.node) if isinstance(written, fx.Proxy) else None
    if name is None or tracer.attribute(name).requires_grad:
        raise writes_error()
    return pytree.tree_map_only(fx.Proxy, lambda x: x if x is written else detached(x), (args, kwargs))


def is_written(proxy: fx.Proxy, name: str) -> bool:
    """Returns whether `proxy` is the module's tensor at the path `name`, possibly after in-place writes."""
    node: Any = proxy.node
    while isinstance(node, fx.Node) and (writes(node.target) or node.target is detached):
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.target == name


def writes_error() -> TraceError:
    """Returns the error for a write that a graph can't hold."""
    return TraceError(f"{guards.deciding_line()} writes under torch.no_grad(), which a graph can't hold")


def versions(node: fx.Node) -> list[int]:
    """Returns the version counter of each input tensor of `node` that may require grad, except modules' tensors.

    A changed version shows a write by an option, such as ``inplace=True``.
    """
    given = [
        source for source in node.all_input_nodes if _may_require_grad(source) and _tensor_of_the_module(source) is None
    ]
    with DisableTorchFunction():
        leaves = pytree.tree_leaves([source.meta.get(VALUE) for source in given])
        return [version(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_inference()]


def _tensor_of_the_module(node: Any) -> str | None:
    """Returns the path of the module's tensor that `node` is, or is a part of; None if there is none."""
    while isinstance(node, fx.Node) and (writes(node.target) or node.target in (detached, operator.getitem)):
        node = node.args[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _may_require_grad(node: fx.Node) -> bool:
    if VALUE not in node.meta:
        return True
    leaves = pytree.tree_leaves(node.meta[VALUE])
    return any(isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves)
