"""Convolutions: ``y = W ∗ x + b`` in one, two or three dimensions, and transposed ones.

The spellings are calls of ``nn.Conv…d``, ``F.conv…d``, and their ATen operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from graphpeft._torch import padding_of_convolution
from graphpeft.graph.ops.reading import applied_if, arguments_of, in_graph, is_computed, path_of, plain_layer

aten = torch.ops.aten


class Padding(NamedTuple):
    """A layer's padding of its input with values other than zeros.

    Attributes:
        amounts: The padding at both sides of each dimension, the last dimension first, as ``F.pad`` takes it.
        mode: The ``mode`` of ``F.pad``.
    """

    amounts: tuple[int, ...]
    mode: str


@dataclass(frozen=True)
class Convolution:
    """A convolution in a graph.

    Attributes:
        node: The node whose value is ``y``, of shape ``(..., out, *positions)``.
        x: The node of the input, of shape ``(..., in, *positions)``.
        weight: The path of the weight in the module that owns the graph.
        bias: The path of the bias; None without a bias, or if the bias is computed.
        function: The function of ``torch.nn.functional`` that computes the convolution.
        options: The stride, padding, dilation, groups and, of a transposed convolution, output_padding: numbers, or
            nodes that read them.
        padding: The padding of the input before the convolution, if it isn't with zeros.
        adds_computed: Whether the bias is computed, not an attribute.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    function: Any
    options: Mapping[str, Any]
    padding: Padding | None
    adds_computed: bool = False

    @property
    def name(self) -> str:
        """The operation's name in sites and tags."""
        return self.node.name

    @property
    def transposed(self) -> bool:
        """Whether the convolution is transposed, so that its weight is stored as (in, out / groups, *kernel)."""
        return self.function in _TRANSPOSED

    @property
    def groups(self) -> Any:
        """The number of groups of features: a number, or the node that reads it."""
        return self.options["groups"]

    def apply(self, x: Any, weight: Any, **options: Any) -> Any:
        """Returns the operation on another input and with another weight, without the bias."""
        x, own = self._operands(x)
        # not called directly: PyTorch would require numbers in lists of options
        return x.tracer.create_proxy("call_function", self.function, (x, weight), {**own, **options})

    def apply_if(self, condition: Any, otherwise: Any, x: Any, weight: Any) -> Any:
        """Returns the result of `apply` in runs where `condition` holds, else `otherwise`."""
        x, own = self._operands(x)
        return applied_if(condition, otherwise, self.function.__name__, x, weight, own)

    def _operands(self, x: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the padded input and the options, for code on proxies."""
        if self.padding is not None:
            x = F.pad(x, self.padding.amounts, mode=self.padding.mode)
        return x, {name: in_graph(value, x) for name, value in self.options.items()}

    def pointwise(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """Returns a convolution of `x` with the same groups and a kernel of size 1."""
        return _POINTWISE[self.function](x, weight, bias, groups=in_graph(self.groups, x))

    def beside_outputs(self, bias: Any) -> Any:
        """Returns a bias in a shape that broadcasts over ``y``."""
        positions = _PLAIN.index(_POINTWISE[self.function]) + 1
        return bias.reshape(-1, *(1,) * positions)

    @staticmethod
    def features(shape: tuple[int, ...], transposed: bool, groups: int) -> tuple[int, int]:
        """Returns the numbers of input and output features."""
        return (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])

    @staticmethod
    def describes(dimensions: int) -> bool:
        """Returns whether a weight with this number of dimensions has a kernel."""
        return dimensions > 2

    @staticmethod
    def size(shape: tuple[int, ...], transposed: bool) -> str:
        """Returns the features in each group and the kernel's size, as text."""
        features = shape[:2] if transposed else shape[1::-1]
        return f"{' → '.join(map(str, features))}, {'×'.join(map(str, shape[2:]))}"


_LAYERS = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
LAYERS: tuple[type[nn.Module], ...] = tuple(_LAYERS)
"""The layers that are convolutions."""

TRANSPOSED_LAYERS = LAYERS[3:]
"""The layers that are transposed convolutions."""

_OPTIONS = ("stride", "padding", "dilation", "groups")

_PLAIN = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_POINTWISE: dict[Any, Any] = dict(zip(_TRANSPOSED, _PLAIN, strict=True)) | {function: function for function in _PLAIN}


def of_module(node: fx.Node, root: nn.Module) -> Convolution | None:
    """Returns the convolution that a call of a layer computes, or None."""
    module: Any = plain_layer(node, root, *LAYERS)
    # the second argument of a transposed convolution is output_size
    if module is None or len(node.args) + len(node.kwargs) != 1:
        return None
    x = node.args[0] if node.args else node.kwargs["input"]
    if not isinstance(x, fx.Node):
        return None
    function = next(function for cls, function in _LAYERS.items() if isinstance(module, cls))
    options = {name: getattr(module, name) for name in _OPTIONS}
    if function in _TRANSPOSED:
        options["output_padding"] = module.output_padding
    padding = None
    if module.padding_mode != "zeros":
        padding = Padding(padding_of_convolution(module), module.padding_mode)
        options["padding"] = 0
    bias = f"{node.target}.bias" if module._parameters.get("bias") is not None else None
    return Convolution(node, x, f"{node.target}.weight", bias, function, options, padding)


def _read(function: Any, node: fx.Node) -> Convolution | None:
    names = ["stride", "padding", "dilation", "groups"]
    if function in _TRANSPOSED:
        names = ["stride", "padding", "output_padding", "groups", "dilation"]
    x, weight, bias, *given = arguments_of(node, "input", "weight", "bias", *names)
    return _convolution(node, function, x, weight, bias, dict(zip(names, given, strict=True)))


def _read_aten(node: fx.Node) -> Convolution | None:
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    x, weight, bias, *given = arguments_of(node, "input", "weight", "bias", *names)
    options: dict[str, Any] = dict(zip(names, given, strict=True))
    dimensions = len(options["stride"])
    if options.pop("transposed"):
        function = _TRANSPOSED[dimensions - 1]
    else:
        function = _PLAIN[dimensions - 1]
        del options["output_padding"]
    return _convolution(node, function, x, weight, bias, options)


def _convolution(
    node: fx.Node, function: Any, x: Any, weight: Any, bias: Any, options: dict[str, Any]
) -> Convolution | None:
    path = path_of(weight)
    options = {name: _DEFAULTS[name] if value is None else value for name, value in options.items()}
    if not isinstance(x, fx.Node) or path is None:
        return None
    if any(map(is_computed, options.values())):
        return None
    adds_computed = bias is not None and path_of(bias) is None
    return Convolution(node, x, path, path_of(bias), function, options, None, adds_computed)


_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}

_SPELLINGS = {
    **{function: function for function in _LAYERS.values()},
    aten.conv1d.default: F.conv1d,
    aten.conv2d.default: F.conv2d,
    aten.conv3d.default: F.conv3d,
    aten.conv_transpose1d.default: F.conv_transpose1d,
    aten.conv_transpose2d.input: F.conv_transpose2d,
    aten.conv_transpose3d.input: F.conv_transpose3d,
}


def _reader(function: Any) -> Any:
    return lambda node: _read(function, node)


FUNCTIONS: dict[Any, Any] = {spelling: _reader(function) for spelling, function in _SPELLINGS.items()} | {
    aten.convolution.default: _read_aten
}
METHODS: dict[str, Any] = {}
