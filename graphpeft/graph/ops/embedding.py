"""Embeddings: the rows of a table ``W`` of shape (entries, features) at indices.

The spellings are calls of ``nn.Embedding``, ``F.embedding``, and their ATen operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from graphpeft.graph.ops.reading import arguments_of, in_graph, is_computed, path_of, plain_layer

LAYERS: tuple[type[nn.Module], ...] = (nn.Embedding,)
"""The layers that are embeddings."""

_OPTIONS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
"""The attributes of an embedding that an operation depends on."""


@dataclass(frozen=True)
class Embedding:
    """An embedding in a graph.

    Attributes:
        node: The node whose value is ``y``, of shape ``(..., features)``.
        x: The node of the indices, of shape ``(...)``.
        weight: The path of the table in the module that owns the graph.
        options: The options of ``F.embedding``: values, or nodes that read them.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    options: Mapping[str, Any]

    bias = None
    adds_computed = False
    transposed = False
    groups = 1

    @property
    def name(self) -> str:
        """The operation's name in sites and tags."""
        return self.node.name

    @property
    def shortens(self) -> bool:
        """Whether reading shortens rows whose norm exceeds ``max_norm``."""
        return self.options.get("max_norm") is not None

    def apply(self, x: Any, weight: Any, **options: Any) -> Any:
        """Returns the rows of another table at other indices; `options` replace the operation's own."""
        own = {name: in_graph(value, x) for name, value in self.options.items()}
        return F.embedding(x, weight, **own | options)

    def beside_outputs(self, bias: Any) -> Any:
        """Returns a bias in a shape that broadcasts over ``y``."""
        return bias

    @staticmethod
    def features(shape: tuple[int, ...], transposed: bool, groups: int) -> tuple[int, int]:
        """Returns the numbers of the table's entries and of output features."""
        return shape[0], shape[1]

    @staticmethod
    def describes(dimensions: int) -> bool:
        """Returns whether a weight with this number of dimensions is a table."""
        return dimensions == 2

    @staticmethod
    def size(shape: tuple[int, ...], transposed: bool) -> str:
        """Returns the entries and features as text."""
        return " → ".join(map(str, shape))


def of_module(node: fx.Node, root: nn.Module) -> Embedding | None:
    """Returns the embedding that a call of an ``nn.Embedding`` computes, or None."""
    module: Any = plain_layer(node, root, nn.Embedding)
    x = node.args[0] if node.args else node.kwargs.get("input")
    if module is None or not isinstance(x, fx.Node):
        return None
    return Embedding(node, x, f"{node.target}.weight", {name: getattr(module, name) for name in _OPTIONS})


def _read(node: fx.Node) -> Embedding | None:
    x, weight, *given = arguments_of(node, "input", "weight", *_OPTIONS)
    return _embedding(node, x, weight, dict(zip(_OPTIONS, given, strict=True)))


def _read_aten(node: fx.Node) -> Embedding | None:
    names = _OPTIONS[:1] + _OPTIONS[3:]
    weight, x, *given = arguments_of(node, "weight", "indices", *names)
    options: dict[str, Any] = dict(zip(names, given, strict=True))
    if options["padding_idx"] == -1:
        options["padding_idx"] = None
    return _embedding(node, x, weight, options)


def _embedding(node: fx.Node, x: Any, weight: Any, options: dict[str, Any]) -> Embedding | None:
    path = path_of(weight)
    if not isinstance(x, fx.Node) or path is None:
        return None
    if any(map(is_computed, options.values())):
        return None
    return Embedding(node, x, path, {name: value for name, value in options.items() if value is not None})


FUNCTIONS: dict[Any, Any] = {F.embedding: _read, torch.ops.aten.embedding.default: _read_aten}
METHODS: dict[str, Any] = {}
