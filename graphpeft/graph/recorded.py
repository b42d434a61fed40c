"""Functions that become one node of a graph where code that runs on proxies calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.fx as fx


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes calls of a function with proxies one node of their graph.

    Args:
        function: The function; its arguments are positional.

    Returns:
        The function, which runs as before where no argument is a proxy.

    Example:
        >>> @recorded
        ... def doubled(x):
        ...     return 2 * x
        >>> doubled(3)
        6
    """

    @functools.wraps(function)
    def record(*args: Any) -> Any:
        # in a loop, since a generator takes longer than some of the functions
        for argument in args:
            if isinstance(argument, fx.Proxy):
                return argument.tracer.create_proxy("call_function", record, args, {})
        return function(*args)

    return record


def as_node(function: Callable[..., Any], first: fx.Proxy, *others: Any) -> fx.Proxy:
    """Makes a call of `function` one node of the graph of its first argument."""
    return first.tracer.create_proxy("call_function", function, (first, *others), {})
