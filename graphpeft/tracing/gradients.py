"""Graph nodes about gradients: calls of ``torch.autograd.Function``, and detached values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from graphpeft._torch import pytree


@dataclass(frozen=True)
class Applied:
    """The ``apply`` of a ``torch.autograd.Function`` as a node's target, which can be pickled.

    Attributes:
        function: The class of the function.
    """

    function: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        return f"{self.function.__name__}_apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the function."""
        return self.function.apply(*args, **kwargs)


def detached(value: Any, *given: Any) -> Any:
    """Returns `value` with its tensors detached, as if it had been computed under ``torch.no_grad()``."""
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", detached, (value, *given), {})
    # `is` instead of `id`, since a compiler may not trace the id of a tensor
    leaves = pytree.tree_leaves(given)
    return pytree.tree_map_only(torch.Tensor, lambda x: x if any(x is y for y in leaves) else x.detach(), value)
