"""Functions whose calls with proxies become one node of the graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.fx as fx
import torch.nn.functional as F


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes each call of a function with proxies one node of their graph.

    Args:
        function: The function; its arguments are positional.

    Returns:
        The function; calls without proxies run as before.

    Examples:
        >>> @recorded
        ... def doubled(x):
        ...     return 2 * x
        >>> doubled(3)
        6
    """

    @functools.wraps(function)
    def record(*args: Any) -> Any:
        # a loop, since a generator expression takes longer than some of the functions
        for argument in args:
            if isinstance(argument, fx.Proxy):
                return argument.tracer.create_proxy("call_function", record, args, {})
        return function(*args)

    return record


def identity_in_evaluation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function that returns its first argument in evaluation, as dropout does, whatever the others are."""
    _IDENTITIES_IN_EVALUATION.add(function)
    return function


def is_identity_in_evaluation(target: Any) -> bool:
    """Returns whether a node's target is such a function."""
    return callable(target) and target in _IDENTITIES_IN_EVALUATION


_IDENTITIES_IN_EVALUATION: set[Callable[..., Any]] = {F.dropout}


def as_node(function: Callable[..., Any], first: fx.Proxy, *others: Any) -> fx.Proxy:
    """Records a call of `function` as one node in the graph of its first argument."""
    return first.tracer.create_proxy("call_function", function, (first, *others), {})
