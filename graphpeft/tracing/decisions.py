"""Decisions of Python code on traced values, and the record of decisions that a graph already checks."""

from __future__ import annotations

import operator
from collections.abc import Container, Set
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import CustomOpDef, written_arguments
from graphpeft.code.identity_checks import may_be_compared
from graphpeft.graph import guards
from graphpeft.graph.calls import Call
from graphpeft.graph.dependencies import storages, writes
from graphpeft.graph.errors import NeedsInputsError
from graphpeft.graph.template import VALUE
from graphpeft.tracing.gradients import Applied
from graphpeft.tracing.scripted import Scripted

TAKES_OUT = (operator.getitem, getattr)
"""Functions that return a part of an object."""


_Decision = tuple[Any, str, Call | None]
"""The node that is decided on, the answer with the question, and the module call."""


class Decisions:
    """The decisions that a graph already checks, each with the storages that the value has its tensors in."""

    def __init__(self) -> None:
        self._known: dict[_Decision, Set[int]] = {}

    def note(self, node: fx.Node, answer: Any, call: Call | None) -> bool:
        """Records that the value of `node` must be `answer` in a module call; returns whether the decision is new."""
        key: _Decision = (node, repr(answer), call)
        if node.op == "call_function":
            # the same question asked twice has two nodes
            key = (node.args[0] if node.args else None, repr((node.target, node.args, answer)), call)
        if key in self._known:
            return False
        self._known[key] = storages(key[0]) if isinstance(key[0], fx.Node) else frozenset()
        return True

    def forget_about(self, node: fx.Node) -> None:
        """Forgets the decisions on a value that was written into, and on the views of its memory."""
        written = storages(node)
        self._known = {key: of for key, of in self._known.items() if key[0] is not node and not of & written}

    def keep_of(self, nodes: Set[fx.Node]) -> None:
        """Forgets the decisions on all nodes outside `nodes`."""
        self._known = {key: of for key, of in self._known.items() if key[0] in nodes}


def is_about_own_tensor(node: fx.Node) -> bool:
    """Returns whether a value depends on a tensor of the module, of which an equal module may have another."""
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        source = waiting.pop()
        if source.op == "get_attr" and isinstance(source.meta.get(VALUE), torch.Tensor):
            return True
        if source not in seen:
            seen.add(source)
            waiting += source.all_input_nodes
    return False


def asks_for_gradient(node: fx.Node) -> bool:
    """Returns whether a value is the ``requires_grad`` of another one that is computed or given, and so may change."""
    return node.target is getattr and "requires_grad" in node.args and node.all_input_nodes[0].op != "get_attr"


def may_be_identity_compared(value: Any, kind: str, target: Any) -> bool:
    """Returns whether `value` is an item or a method's result that the calling code may compare by identity."""
    is_taken = kind == "call_method" or target is operator.getitem
    return is_taken and may_be_compared(value, guards.deciding_frame().f_code)


def writes_itself(node: fx.Node) -> bool:
    """Returns whether a call writes into an argument, by its name or as its arguments ask."""
    return writes(node.target) or "out" in node.kwargs or node.kwargs.get("inplace") is True


def may_write(node: fx.Node) -> bool:
    """Returns whether a call writes into an argument, or nothing tells that it doesn't."""
    is_unknown = isinstance(node.target, Scripted | CustomOpDef | Applied)
    return is_unknown or writes_itself(node) or bool(written_arguments(node.target))


def may_lack(part: fx.Node, kept: Container[str]) -> bool:
    """Returns whether `part` belongs to an argument, or to the output of a module in `kept`, which stays a call."""
    whole: Any = part.args[0]
    while isinstance(whole, fx.Node) and whole.target in TAKES_OUT:
        whole = whole.args[0]
    if not isinstance(whole, fx.Node) or isinstance(whole.meta.get(VALUE), torch.Tensor | torch.Size):
        return False
    return whole.op == "placeholder" or (whole.op == "call_module" and str(whole.target) in kept)


def needs_inputs_error(root: nn.Module, error: Exception | None) -> NeedsInputsError:
    """Returns the error for a decision on an unknown value, or for code that fails without example values."""
    if error is None:
        decides = f"decides on its inputs at {guards.deciding_line()}"
    else:
        decides = f"can't run without example inputs at {guards.failing_line(error)} ({error})"
    return NeedsInputsError(
        f"{type(root).__name__}'s forward {decides}; pass example_inputs: a tuple of positional arguments or a dict of "
        "keyword arguments of the model"
    )
