"""Brings the many spellings of one operation into one form, so that rules speak of operations alone.

A linear operation is ``y = x Wᵀ + b`` with a weight ``W`` that the graph reads as it is stored: ``(out, in)``, or
``(in, out)`` where the spelling multiplies by the stored matrix itself. It is written as a call of an ``nn.Linear``,
``F.linear``, ``x @ w``, ``matmul``, ``mm``, ``addmm``, ``einsum``, or as one of their ATen operators.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from graphpeft import in_place
from graphpeft.tracing.graph_module import template_of
from graphpeft.tracing.source import ABOUT

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """A linear operation in a graph.

    Attributes:
        node: The node whose value is ``y``, of shape ``(..., out)``.
        x: The node of the input, of shape ``(..., in)``.
        weight: The path of the weight in the module that owns the graph.
        bias: The path of the bias, or None if there is none, or if it isn't a parameter.
        transposed: Whether the weight is stored as ``(in, out)``.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    transposed: bool

    @property
    def name(self) -> str:
        """What the operation is called in sites and tags."""
        return self.node.name


def find_ops(graph: fx.Graph, root: nn.Module) -> list[Linear]:
    """Returns the operations of `graph` whose weights are tensors of `root`, in the order of the graph."""
    found = (read_op(node, root) for node in graph.nodes)
    return [op for op in found if op is not None]


def read_op(node: fx.Node, root: nn.Module) -> Linear | None:
    """Returns the operation that `node` computes, or None if it is none of the vocabulary."""
    if node.op == "call_module":
        return _module_linear(node, root)
    if node.op == "call_function":
        reader = _FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        reader = _METHODS.get(str(node.target))
    else:
        return None
    return reader(node) if reader is not None else None


def reads(graph: fx.Graph, path: str) -> bool:
    """Tells whether `graph` reads the tensor at `path` itself, beside calls of its module."""
    return any(node.op == "get_attr" and node.target == path for node in graph.nodes)


def other_uses(graph: fx.Graph, path: str, operations: list[Linear]) -> list[str]:
    """Returns what `graph` does with the tensor at `path` beside these operations, for a person to read."""
    inputs = {op.node: op.x for op in operations}
    found: list[str] = []
    waiting = [node for node in graph.nodes if node.op == "get_attr" and node.target == path]
    while waiting:
        weight = waiting.pop()
        for user in weight.users:
            if _transposed(user) is not None:
                waiting.append(user)
            # an operation may have the weight as its input, too
            elif inputs.get(user, weight) is weight and not _only_asks(user):
                found.append(getattr(user.target, "__name__", str(user.target)))
    return found


def _only_asks(node: fx.Node) -> bool:
    """Tells whether `node` asks something about a tensor without using its values."""
    about = node.args[1] if node.target is getattr else node.target
    return about in ABOUT


def _module_linear(node: fx.Node, root: nn.Module) -> Linear | None:
    module = root.get_submodule(str(node.target))
    # a forward of its own, of a subclass or of the instance, need not be linear, nor need a graph that was edited
    if in_place.original_class(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        return None
    template = template_of(module)
    if template is not None and not template.shared:
        return None
    x = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(x, fx.Node):
        return None
    bias = f"{node.target}.bias" if module._parameters.get("bias") is not None else None
    return Linear(node, x, f"{node.target}.weight", bias, transposed=False)


def _arguments(node: fx.Node, *names: str) -> list[Any]:
    """Returns the arguments of a call in the order of `names`, whether they were given by position or by name."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name) for name in names]


def _linear(node: fx.Node, x: Any, weight: Any, bias: Any, transposed: bool) -> Linear | None:
    """Makes a `Linear` if `weight` is a stored matrix or a transpose of one."""
    while isinstance(weight, fx.Node) and (matrix := _transposed(weight)) is not None:
        weight, transposed = matrix, not transposed
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node) and weight.op == "get_attr"):
        return None
    bias_path = str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
    return Linear(node, x, str(weight.target), bias_path, transposed)


def _transposed(node: fx.Node) -> Any:
    """Returns the matrix that `node` is the transpose of, or None."""
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("T", "mT"):
        return node.args[0]
    if node.op not in ("call_method", "call_function"):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in ("t", "t.default"):
        return _arguments(node, "input")[0]
    if name in ("transpose", "transpose.int", "swapaxes", "swapdims"):
        names = ("axis0", "axis1") if name == "swapaxes" else ("dim0", "dim1")
        matrix, *dims = _arguments(node, "input", *names)
        return matrix if tuple(dims) in ((0, 1), (1, 0), (-1, -2), (-2, -1)) else None
    if name in ("permute", "permute.default"):
        matrix, dims = _arguments(node, "input", "dims")
        order = dims if isinstance(dims, list | tuple) else node.args[1:]
        return matrix if tuple(order) == (1, 0) else None
    return None


def _read_linear(node: fx.Node) -> Linear | None:
    x, weight, bias = _arguments(node, "input", "weight", "bias")
    return _linear(node, x, weight, bias, transposed=False)


def _read_matmul(node: fx.Node) -> Linear | None:
    values = [*node.args, *node.kwargs.values()]
    # a matrix from the left, W @ x, multiplies columns, not rows
    return _linear(node, values[0], values[1], None, transposed=True) if len(values) == 2 else None


def _read_addmm(node: fx.Node) -> Linear | None:
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return None
    bias, x, weight = _arguments(node, "input", "mat1", "mat2")
    return _linear(node, x, weight, bias, transposed=True)


def _read_einsum(node: fx.Node) -> Linear | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    inputs, result = equation.replace(" ", "").split("->")
    x, weight = inputs.split(",")
    if len(weight) > len(x):
        x, weight, operands = weight, x, operands[::-1]
    rows, out = result[:-1], result[-1:]
    # x is (rows, in), the result (rows, out), and the weight has these two last letters
    if x[:-1] != rows or x[-1:] in rows or not out.isalpha() or {x[-1:], out} != set(weight) or len(weight) != 2:
        return None
    return _linear(node, operands[0], operands[1], None, transposed=weight == x[-1] + out)


_FUNCTIONS: dict[Any, Any] = {
    F.linear: _read_linear,
    aten.linear.default: _read_linear,
    operator.matmul: _read_matmul,
    torch.matmul: _read_matmul,
    torch.mm: _read_matmul,
    aten.matmul.default: _read_matmul,
    aten.mm.default: _read_matmul,
    torch.addmm: _read_addmm,
    aten.addmm.default: _read_addmm,
    torch.einsum: _read_einsum,
    torch.functional.einsum: _read_einsum,
    aten.einsum.default: _read_einsum,
}
_METHODS: dict[str, Any] = {
    "matmul": _read_matmul,
    "mm": _read_matmul,
    "__matmul__": _read_matmul,
    "addmm": _read_addmm,
}
