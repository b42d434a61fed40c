"""A weight as such, whatever the graph computes with it: the place where the graph reads it.

A method that changes weights can so adapt a weight that no other operation describes: one inside a fused function, one
with a dimension for experts, one that several operations share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx


@dataclass(frozen=True)
class Weight:
    """A weight that a graph reads.

    Attributes:
        node: The node whose value is the weight.
        weight: The weight's path in the module that owns the graph.
    """

    node: fx.Node
    weight: str

    @property
    def name(self) -> str:
        """The operation's name in sites and tags."""
        return self.node.name

    @staticmethod
    def features(shape: tuple[int, ...], transposed: bool, groups: int) -> tuple[int | None, int | None]:
        """Returns the numbers of input and output features of a matrix, or of each of a batch; None for vectors."""
        if len(shape) < 2:
            return None, None
        return (shape[-2], shape[-1]) if transposed else (shape[-1], shape[-2])

    @staticmethod
    def size(shape: tuple[int, ...], transposed: bool) -> str:
        """Returns the shape as text."""
        return "×".join(map(str, shape))
