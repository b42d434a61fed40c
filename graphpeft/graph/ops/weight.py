"""A weight as such, whatever is done with it: the place where a graph reads it.

This is how a method that can say how it changes a weight adapts what no other operation describes: a weight inside a
fused function, one with an index for experts, one that several operations share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx


@dataclass(frozen=True)
class Weight:
    """A weight that a graph reads.

    Attributes:
        node: The node whose value is the weight.
        weight: Its path in the module that owns the graph.
    """

    node: fx.Node
    weight: str

    @property
    def name(self) -> str:
        """What the operation is called in sites and tags."""
        return self.node.name

    @staticmethod
    def features(shape: tuple[int, ...], transposed: bool, groups: int) -> tuple[int | None, int | None]:
        """Returns how many features go in and come out, as far as a matrix tells; None for others."""
        if len(shape) < 2:
            return None, None
        return (shape[-2], shape[-1]) if transposed else (shape[-1], shape[-2])

    @staticmethod
    def size(shape: tuple[int, ...], transposed: bool) -> str:
        """Returns its shape, for a person to read."""
        return "×".join(map(str, shape))
