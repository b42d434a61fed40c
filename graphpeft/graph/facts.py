"""What a node's value depends on: the nodes that it is computed from, and what of these may be another in each run."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import pytree, storage_key
from graphpeft.code.attribute_paths import METADATA_ATTRIBUTES
from graphpeft.graph.drawing_functions import draws
from graphpeft.graph.masks import ASKED_ABOUT, attention_mask
from graphpeft.graph.template import VALUE


def above(node: fx.Node) -> set[fx.Node]:
    """Returns the nodes from whose values that of `node` is computed, `node` among them."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting += value_inputs(source)
    return found


def above_with_writes(node: fx.Node) -> set[fx.Node]:
    """Returns the nodes from whose values that of `node` is computed, with those that write into any of them."""
    writers = [(other, other.args[0]) for other in node.graph.nodes if other.args and writes(other.target)]
    found: set[fx.Node] = set()
    new = above(node)
    while not new <= found:
        found |= new
        memory = {part for source in found for part in _memory(source)}
        new = set().union(
            *(above(writer) for writer, into in writers if isinstance(into, fx.Node) and _memory(into) & memory)
        )
    return found


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """Returns the inputs of `node` whose values it uses, and not only their shape or other metadata."""
    if reads_metadata_only(node):
        return []
    asked = [node.kwargs.get(name) for name in ASKED_ABOUT] if node.target is attention_mask else []
    return [source for source in node.all_input_nodes if source not in asked]


def reads_metadata_only(node: fx.Node) -> bool:
    """Returns whether `node` reads the shape or other metadata of a tensor, and none of its values."""
    about = node.args[1] if node.target is getattr else node.target
    return about in METADATA_ATTRIBUTES


def _memory(node: fx.Node) -> set[int]:
    """Returns what tells the memory of a value's tensors from that of others; views share it."""
    leaves = pytree.tree_leaves(node.meta.get(VALUE))
    return {storage_key(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}


def varies(node: fx.Node) -> bool:
    """Returns whether a node's value may change from run to run: an argument, a random number, a module's result."""
    if node.op == "placeholder" or node.op == "call_module":
        return True
    if draws(node.target):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "get_attr" and is_random(name)


def is_trained(node: fx.Node) -> bool:
    """Returns whether a node reads a tensor of a module that training may change."""
    value = node.meta.get(VALUE)
    return node.op == "get_attr" and (isinstance(value, nn.Parameter) or getattr(value, "requires_grad", False))


def is_random(name: str) -> bool:
    """Tells by its name whether a function draws random numbers."""
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
"""The operators of `operator` that change their first argument, with what they do to one that can't be changed."""


_WRITERS = (operator.setitem, *(getattr(operator, name) for name in IN_PLACE))


@dataclass(frozen=True)
class InPlace:
    """An operator in place on a value of which isn't known whether it can be changed, as what a node calls.

    Generated code has ``n += 1`` for `operator.iadd`. If that is a number, what had the name before is lost.

    Attributes:
        function: The operator.
    """

    function: Callable[[Any, Any], Any]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, value: Any, other: Any) -> Any:
        """Returns `value`, changed, or a new value."""
        return self.function(value, other)


def writes(target: Any) -> bool:
    """Returns whether a call of `target`, a node's function or the name of a method, changes its first argument."""
    if target in _WRITERS or isinstance(target, InPlace):
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def writes_by_method(name: str) -> bool:
    """Returns whether a tensor's method of this name changes it."""
    return name == "__setitem__" or name.removeprefix("__").removesuffix("__") in IN_PLACE or writes(name)
