"""The graph of gradients that autograd has recorded: from which tensors one was computed, and by which functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from graphpeft._torch import base_of


def leaves_above(tensor: Tensor, made_by: Any) -> set[Tensor]:
    """Returns the leaves from which a tensor was computed.

    Args:
        tensor: The tensor.
        made_by: The node that has made it, which it may have lost since; None without one.
    """
    if made_by is not None:
        return {node.variable for node in _above(made_by) if hasattr(node, "variable")}
    # without gradients, a view has no node, though it requires a gradient as its base does
    base = base_of(tensor)
    if base is None:
        return {tensor}
    return {base} if base.is_leaf else leaves_above(base, base.grad_fn)


class SilentFunctions:
    """Notes each `torch.autograd.Function` whose backward gives no gradient.

    Args:
        loss: The loss, before its backward.
    """

    def __init__(self, loss: Tensor) -> None:
        self._found: list[Any] = []
        for node in [node for node in _above(loss.grad_fn) if isinstance(node, BackwardCFunction)]:
            node.register_hook(lambda given, _, node=node: self._note(node, given))

    def _note(self, node: Any, given: tuple[Tensor | None, ...]) -> None:
        if all(each is None for each in given):
            self._found.append(node)

    def above(self, tensor: Tensor) -> str | None:
        """Returns the name of such a function through which a tensor has come to the loss; None without one."""
        for node in self._found:
            if any(getattr(above, "variable", None) is tensor for above in _above(node)):
                return type(node).__name__.removesuffix("Backward")
        return None


def _above(node: Any) -> Iterator[Any]:
    """Yields a node and all from which its value was computed."""
    seen: set[Any] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [source for source, _ in node.next_functions]
