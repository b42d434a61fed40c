"""Linear operations: ``y = x Wᵀ + b`` with a weight ``W`` that the graph reads.

The weight is stored as ``(out, in)``, or as ``(in, out)`` where the spelling multiplies by the stored matrix itself.
The spellings are calls of ``nn.Linear``, ``F.linear``, ``x @ w``, ``matmul``, ``mm``, ``addmm``, ``einsum``, and their
ATen operators.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from graphpeft.graph.ops.reading import applied_if, arguments_of, path_of, plain_layer

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """A linear operation in a graph.

    Attributes:
        node: The node whose value is ``y``, of shape ``(..., out)``.
        x: The node of the input, of shape ``(..., in)``.
        weight: The path of the weight in the module that owns the graph.
        bias: The path of the bias; None without a bias, or if the bias is computed.
        transposed: Whether the weight is stored as ``(in, out)``.
        adds_computed: Whether the bias is computed, not an attribute.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    transposed: bool
    adds_computed: bool = False

    @property
    def name(self) -> str:
        """The operation's name in sites and tags."""
        return self.node.name

    @property
    def groups(self) -> int:
        """One: each output depends on all inputs."""
        return 1

    def apply(self, x: Any, weight: Any) -> Any:
        """Returns the operation on another input and with another weight of the same layout, without the bias."""
        return x @ weight if self.transposed else F.linear(x, weight)

    def apply_if(self, condition: Any, otherwise: Any, x: Any, weight: Any) -> Any:
        """Returns the result of `apply` in runs where `condition` holds, else `otherwise`."""
        return applied_if(condition, otherwise, "matmul" if self.transposed else "linear", x, weight, {})

    def beside_outputs(self, bias: Any) -> Any:
        """Returns a bias in a shape that broadcasts over ``y``."""
        return bias

    @staticmethod
    def features(shape: tuple[int, ...], transposed: bool, groups: int) -> tuple[int, int]:
        """Returns the numbers of input and output features."""
        return (shape[-2], shape[-1]) if transposed else (shape[-1], shape[-2])

    @staticmethod
    def describes(dimensions: int) -> bool:
        """Returns whether a weight with this number of dimensions is a matrix."""
        return dimensions == 2

    @staticmethod
    def size(shape: tuple[int, ...], transposed: bool) -> str:
        """Returns the features as text."""
        return " → ".join(map(str, shape if transposed else shape[::-1]))


def of_module(node: fx.Node, root: nn.Module) -> Linear | None:
    """Returns the linear operation that a call of an ``nn.Linear`` computes, or None."""
    module = plain_layer(node, root, nn.Linear)
    x = node.args[0] if node.args else node.kwargs.get("input")
    if module is None or not isinstance(x, fx.Node):
        return None
    bias = f"{node.target}.bias" if module._parameters.get("bias") is not None else None
    return Linear(node, x, f"{node.target}.weight", bias, transposed=False)


class Product(NamedTuple):
    """A product with a matrix, as a node spells it: ``x @ matrix`` or ``x @ matrixᵀ``, plus a bias.

    Attributes:
        x: The input.
        matrix: The matrix; transposes around it are taken off.
        bias: The added value; None if there is none.
        transposed: Whether the matrix is (in, out).
    """

    x: Any
    matrix: Any
    bias: Any
    transposed: bool


_Spelled = tuple[Any, Any, Any, bool]
"""The values of a `Product`, with the matrix as it is spelled."""


def product_of(node: fx.Node) -> Product | None:
    """Returns the product that a call of a function or a method computes, whatever its operands are, or None."""
    reader = _METHODS.get(str(node.target)) if node.op == "call_method" else _FUNCTIONS.get(node.target)
    spelled = reader(node) if reader is not None else None
    if spelled is None:
        return None
    x, weight, bias, transposed = spelled
    while isinstance(weight, fx.Node) and (matrix := transpose_of(weight)) is not None:
        weight, transposed = matrix, not transposed
    return Product(x, weight, bias, transposed)


def _read(reader: Callable[[fx.Node], _Spelled | None], node: fx.Node) -> Linear | None:
    """Returns a `Linear` if the node multiplies by a stored matrix or by the transpose of one, else None."""
    spelled = reader(node)
    if spelled is None:
        return None
    x, weight, bias, transposed = spelled
    while isinstance(weight, fx.Node) and (matrix := transpose_of(weight)) is not None:
        weight, transposed = matrix, not transposed
    path = path_of(weight)
    if not isinstance(x, fx.Node) or path is None:
        return None
    return Linear(node, x, path, path_of(bias), transposed, bias is not None and path_of(bias) is None)


def transpose_of(node: fx.Node) -> Any:
    """Returns the matrix that `node` transposes, or None."""
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("T", "mT"):
        return node.args[0]
    if node.op not in ("call_method", "call_function"):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in ("t", "t.default"):
        return arguments_of(node, "input")[0]
    if name in ("transpose", "transpose.int", "swapaxes", "swapdims"):
        names = ("axis0", "axis1") if name == "swapaxes" else ("dim0", "dim1")
        matrix, *dims = arguments_of(node, "input", *names)
        return matrix if tuple(dims) in ((0, 1), (1, 0), (-1, -2), (-2, -1)) else None
    if name in ("permute", "permute.default"):
        matrix, dims = arguments_of(node, "input", "dims")
        order = dims if isinstance(dims, list | tuple) else node.args[1:]
        return matrix if tuple(order) == (1, 0) else None
    return None


def _read_linear(node: fx.Node) -> _Spelled | None:
    x, weight, bias = arguments_of(node, "input", "weight", "bias")
    return x, weight, bias, False


def _read_matmul(node: fx.Node) -> _Spelled | None:
    values = dict(enumerate(node.args)) | {_OF_MATMUL.get(name, name): value for name, value in node.kwargs.items()}
    # a matrix from the left, W @ x, multiplies columns, not rows
    return (values[0], values[1], None, True) if values.keys() == {0, 1} else None


_OF_MATMUL = {"input": 0, "self": 0, "other": 1, "mat2": 1, "tensor2": 1}
"""The positions of the arguments of products of matrices, by the names that PyTorch has for them."""


def _read_addmm(node: fx.Node) -> _Spelled | None:
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return None
    bias, x, weight = arguments_of(node, "input", "mat1", "mat2")
    return x, weight, bias, True


def _read_einsum(node: fx.Node) -> _Spelled | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    inputs, result = equation.replace(" ", "").split("->")
    x, weight = inputs.split(",")
    if len(weight) > len(x):
        x, weight, operands = weight, x, operands[::-1]
    letters = x.replace(".", "")
    if len(set(letters)) < len(letters) or len(set(weight)) < len(weight):
        return None  # a repeated letter takes a diagonal
    rows, out = result[:-1], result[-1:]
    # x is (rows, in), the result (rows, out), and the letters of the weight are in and out
    if x[:-1] != rows or x[-1:] in rows or not out.isalpha() or {x[-1:], out} != set(weight) or len(weight) != 2:
        return None
    return operands[0], operands[1], None, weight == x[-1] + out


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

FUNCTIONS: dict[Any, Any] = {function: partial(_read, reader) for function, reader in _FUNCTIONS.items()}
METHODS: dict[str, Any] = {name: partial(_read, reader) for name, reader in _METHODS.items()}
