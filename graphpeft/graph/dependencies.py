"""The dependencies of a node's value: its source nodes, and whether a value may differ between runs."""

from __future__ import annotations

import linecache
import operator
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import OpOverload, pytree, storage_key, written_arguments
from graphpeft.code.attribute_paths import METADATA_ATTRIBUTES
from graphpeft.graph.contexts import enter_autocast, enter_gradients, leave_autocast, leave_gradients
from graphpeft.graph.drawing_functions import draws
from graphpeft.graph.holders import Holder
from graphpeft.graph.hosts.transformers_masks import METADATA_ARGUMENTS, attention_mask
from graphpeft.graph.template import LINE, VALUE


def above(node: fx.Node) -> set[fx.Node]:
    """Returns the nodes from which the value of `node` is computed, including `node`."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting += value_inputs(source)
    return found


def above_with_writes(node: fx.Node) -> set[fx.Node]:
    """Returns the nodes from which the value of `node` is computed, including in-place writes to their values."""
    writers = [(other, other.args[0]) for other in node.graph.nodes if other.args and writes(other.target)]
    found: set[fx.Node] = set()
    new = above(node)
    while not new <= found:
        found |= new
        memory = {part for source in found for part in storages(source)}
        new = set().union(
            *(above(writer) for writer, into in writers if isinstance(into, fx.Node) and storages(into) & memory)
        )
    return found


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """Returns the inputs of `node` whose values it uses, not only their metadata such as the shape."""
    if reads_metadata_only(node):
        return []
    asked = [node.kwargs.get(name) for name in METADATA_ARGUMENTS] if node.target is attention_mask else []
    return [source for source in node.all_input_nodes if source not in asked]


def reads_metadata_only(node: fx.Node) -> bool:
    """Returns whether `node` reads only a tensor's metadata, such as its shape."""
    about = node.args[1] if node.target is getattr else node.target
    return about in METADATA_ATTRIBUTES


def storages(node: fx.Node) -> set[int]:
    """Returns the storage keys of the tensors in a node's value; views share their base's storage."""
    leaves = pytree.tree_leaves(node.meta.get(VALUE))
    return {storage_key(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}


def varies(node: fx.Node) -> bool:
    """Returns whether a node's value may differ between runs: an argument, a random number, a module's result."""
    if node.op == "placeholder" or node.op == "call_module":
        return True
    if draws(node.target):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "get_attr" and is_random(name)


def is_trained(node: fx.Node) -> bool:
    """Returns whether a node reads a module's tensor that training may change."""
    value = node.meta.get(VALUE)
    return node.op == "get_attr" and (isinstance(value, nn.Parameter) or getattr(value, "requires_grad", False))


def is_random(name: str) -> bool:
    """Returns whether a function draws random numbers, judged by its name."""
    return _RANDOM.search(name) is not None


_RANDOM = re.compile(
    r"rand|dropout|normal(?!ize)|uniform|bernoulli|multinomial|poisson|exponential|geometric|cauchy|rrelu"
)


IN_PLACE = {
    "iadd": operator.add, "isub": operator.sub, "imul": operator.mul, "imatmul": operator.matmul,
    "itruediv": operator.truediv, "ifloordiv": operator.floordiv, "imod": operator.mod, "ipow": operator.pow,
    "iand": operator.and_, "ior": operator.or_, "ixor": operator.xor, "ilshift": operator.lshift,
    "irshift": operator.rshift,
}  # fmt: skip
"""The in-place operators of module `operator` by name, each with its operator for immutable values."""


_WRITERS = (operator.setitem, *(getattr(operator, name) for name in IN_PLACE))


@dataclass(frozen=True)
class InPlace:
    """An in-place operator as a node's target, for a value that may be immutable.

    For `operator.iadd`, fx generates ``n += 1``. If ``n`` is a number, that rebinds ``n`` and the old value is lost.

    Attributes:
        function: The operator.
    """

    function: Callable[[Any, Any], Any]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, value: Any, other: Any) -> Any:
        """Returns `value` changed in place, or a new value."""
        return self.function(value, other)


def writes(target: Any) -> bool:
    """Returns whether a call of `target`, a function or a method's name, changes its first argument in place."""
    if target in _WRITERS or isinstance(target, InPlace):
        return True
    if isinstance(target, OpOverload):
        return 0 in written_arguments(target).values()
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def writes_by_method(name: str) -> bool:
    """Returns whether a tensor's method of this name changes the tensor."""
    return name == "__setitem__" or name.removeprefix("__").removesuffix("__") in IN_PLACE or writes(name)


def separates(node: fx.Node, root: nn.Module) -> bool:
    """Returns whether the same computation may give another value after a node than before it.

    Such a node writes into tensors, or is the edge of a region under autocast or with gradients.
    """
    if node.op == "call_module":
        return any(_may_write(module) for module in root.get_submodule(str(node.target)).modules())
    writes_there = node.op.startswith("call_") and writes(node.target)
    is_told = bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
    return writes_there or is_told or node.target in _EDGES_OF_REGIONS


def _may_write(module: nn.Module) -> bool:
    if isinstance(module, Holder):
        return False  # nothing calls it
    return not type(module).__module__.startswith("torch.nn.") or bool(getattr(module, "inplace", False))


_EDGES_OF_REGIONS = (enter_autocast, leave_autocast, enter_gradients, leave_gradients)


def line_of(node: fx.Node) -> str:
    """Returns the line of the model's code that made a node, with its file and number; "" if it isn't known."""
    if LINE not in node.meta or node.op in ("placeholder", "output"):
        return ""
    file, number = node.meta[LINE]
    return f"{os.path.basename(file)}:{number}  {linecache.getline(file, number).strip()}"
