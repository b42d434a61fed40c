"""What a graph holds about gradients: calls of ``torch.autograd.Function``, and values through which none goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphpeft._torch import pytree


@dataclass(frozen=True)
class Applied:
    """The call of a function with its own gradient, as what a node calls; it can be pickled.

    Attributes:
        function: The class of the function.
    """

    function: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        return f"{self.function.__name__}_apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the function computes."""
        return self.function.apply(*args, **kwargs)


def detached(value: Any, *given: Any) -> Any:
    """Returns `value` as if it had been computed under ``torch.no_grad()``: no gradient goes through its tensors.

    Args:
        value: What was computed.
        given: Of what. A tensor that was handed on, as ``x.float()`` may do, keeps its gradient.
    """
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", detached, (value, *given), {})
    # by comparison, since a compiler may not follow the id of a tensor
    leaves = pytree.tree_leaves(given)
    return pytree.tree_map_only(torch.Tensor, lambda x: x if any(x is y for y in leaves) else x.detach(), value)
